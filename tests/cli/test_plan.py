"""`fourfold plan` as a person and a machine see it; its figures are tests/engine/test_planning.py's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fourfold.cli import main
from fourfold.weights.synthetic import write_checkpoint
from tests.core.configs import hugging_face

pytestmark = pytest.mark.full


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def test_a_person_reads_what_fits_and_what_to_type() -> None:
    result = call("flash", "--gpus", "2xH200", "--context", 65536, "--concurrency", 16)
    assert result.exit_code == 0
    for text in (
        "weights:     148.65 GiB, of them 140.25 GiB routed experts",
        "3,899 bytes a token",
        "2 × H200 (139.80 GiB each, sm_90)",
        "does not fit: weights and workspace alone need",
        "fits: 16 requests of 65,536 tokens at once (not served yet)",
        "fourfold serve flash --tensor-parallel-size 2 --max-model-len 65536 --max-num-seqs 16",
        "not served yet: the engine runs on one GPU",
        "65,536 tokens of context:    16 requests",
    ):
        assert text in result.output, (text, result.output)


def test_a_wish_that_fits_nowhere_is_exit_status_1() -> None:
    result = call("pro", "--gpus", "16xH200", "--context", 131072, "--concurrency", 64)
    assert result.exit_code == 1
    assert "over 16 ranks is 192, not a multiple of 128" in result.output
    assert "TP 8, EP 1 takes" in result.output


def test_what_runs_today_is_said_beside_what_is_best() -> None:
    result = call("flash", "--gpus", "2xMI355X", "--context", 1048576, "--concurrency", 40)
    assert result.exit_code == 0
    assert "not served yet" in result.output
    result = call("flash", "--gpus", "8xMI300X", "--context", 32768, "--concurrency", 32)
    assert "(once a GPU)" in result.output


def test_json_has_every_figure() -> None:
    document = json.loads(
        call("flash-base", "--gpus", "8xMI300X", "--gpus", "1xH200", "--json").stdout
    )
    assert sum(document["weight_bytes"].values()) == 292_555_345_480
    assert document["bytes_a_token"] == 998_208 / 256
    first, second = document["plans"]
    assert (first["gpus"]["count"], first["gpus"]["name"]) == (8, "MI300X")
    assert [s["tensor_parallel_size"] for s in first["splits"]] == [1, 2, 2, 4, 4, 8, 8]
    split = first["splits"][-1]
    assert split["fits"]
    assert split["table"][0][0] == 1024
    assert first["recommended"]["note"].startswith("not served yet")
    assert second["recommended"] is None
    assert second["splits"][0]["problem"]


def test_without_gpus_the_fewest_of_each() -> None:
    result = call("flash", "--context", 8192, "--concurrency", 8)
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.startswith("  ")}
    assert " 1 × with TP 1" in lines["MI300X"]
    assert " 2 × with TP 2" in lines["H200"]
    assert lines["L4"].endswith("not on 16")


def test_directories_hub_names_and_geometries(tmp_path: Path) -> None:
    """Headers, config.json alone, transformers' spelling of it; what is asked of a geometry only."""
    write_checkpoint(tmp_path / "c", "tiny", holes=True)
    assert "storage from headers" in call(tmp_path / "c", "--gpus", "8GiB").output
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hugging_face()))
    result = call(tmp_path / "hf", "--gpus", "8xH200")
    assert result.exit_code == 0, result.output
    assert "43 layers, storage from config.json alone" in result.output
    for arguments, text in (
        ((tmp_path / "c", "--layers", 3), "--layers"),
        (("flash", "--layers", 99), "1 to 43"),
        (("flash", "--gpus", "8xH300"), "MI300X"),
        (("no/such",), "not in the local cache"),
    ):
        result = call(*arguments)
        assert (result.exit_code, text in result.stderr) == (2, True), result.output

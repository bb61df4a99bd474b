"""Headers and the index: what is wrong with a file is said with its name and the byte."""

import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fourfold.core.errors import CheckpointError
from fourfold.weights.header import MAX_HEADER_BYTES, read_header
from fourfold.weights.index import INDEX_FILE, read_index
from tests.weights.written import edit_index, save_raw, tiny_config, write, write_index


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two shards of two tensors each, and their index."""
    save = safetensors.torch.save_file
    save({"a": torch.ones(3), "b": torch.ones(2, 4, dtype=torch.bfloat16)}, shard(tmp_path, 1))
    save({"c": torch.ones(5, dtype=torch.int64), "d": torch.ones(1)}, shard(tmp_path, 2))
    names = {"a": 1, "b": 1, "c": 2, "d": 2}
    write_index(tmp_path, {name: shard(tmp_path, n).name for name, n in names.items()}, 72)
    return tmp_path


def shard(directory: Path, number: int, count: int = 2) -> Path:
    return directory / f"model-{number:05d}-of-{count:05d}.safetensors"


def refused(directory: Path, *parts: str) -> str:
    """The message of the refusal, which must hold all `parts`."""
    with pytest.raises(CheckpointError) as caught:
        read_index(directory)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    return message


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_headers_agree_with_the_safetensors_library(tmp_path: Path) -> None:
    written = write(tiny_config())
    written.save(tmp_path)
    index = read_index(tmp_path)
    assert set(index.headers) == set(written.tensors)
    assert index.notes == ()
    for name, header in index.headers.items():
        tensor = written.tensors[name]
        data = (tmp_path / header.file).read_bytes()[header.offset_begin : header.offset_end]
        assert header.shape == tuple(tensor.shape)
        assert data == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert index.nbytes == sum(tensor.nbytes for tensor in written.tensors.values())


def test_one_file_without_index(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert list(read_index(tmp_path).headers) == ["a"]


def test_shards_without_index(directory: Path) -> None:
    (directory / INDEX_FILE).unlink()
    assert set(read_index(directory).headers) == {"a", "b", "c", "d"}


def test_four_bit_items(tmp_path: Path) -> None:
    save_raw(tmp_path / "model.safetensors", {"a": ("F4", [3, 32], bytes(48))})
    assert read_index(tmp_path).headers["a"].nbytes == 48


def test_an_empty_header_and_an_empty_tensor(tmp_path: Path) -> None:
    save_raw(tmp_path / "model.safetensors", {})
    assert not read_index(tmp_path).headers
    save_raw(tmp_path / "model.safetensors", {"a": ("F32", [0, 4], b""), "b": ("U8", [1], b"x")})
    assert read_index(tmp_path).headers["a"].nbytes == 0


def test_links_are_followed(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    snapshot = tmp_path_factory.mktemp("snapshot")
    for path in directory.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert len(read_index(snapshot).headers) == 4


# One message for each way in which files and index can disagree.


def test_stale_index_entry(directory: Path) -> None:
    edit_index(directory, lambda files: files.update(ghost=shard(directory, 2).name))
    byte = (directory / INDEX_FILE).read_bytes().find(b'"ghost"')
    refused(directory, INDEX_FILE, f"byte {byte}", "stale", "ghost", shard(directory, 2).name)


def test_stale_index_entry_that_is_expected(directory: Path) -> None:
    edit_index(directory, lambda files: files.update(ghost=shard(directory, 2).name))
    index = read_index(directory, lambda name, headers: name == "ghost" and "c" in headers)
    assert "ghost" in index.notes[0]
    assert "ghost" not in index.headers


def test_tensor_missing_from_the_index(directory: Path) -> None:
    edit_index(directory, lambda files: files.pop("d"))
    begin = read_header(shard(directory, 2))["d"].offset_begin
    refused(directory, shard(directory, 2).name, f"byte {begin}", "d is not in", INDEX_FILE)


def test_tensor_in_another_shard_than_the_index_says(directory: Path) -> None:
    edit_index(directory, lambda files: files.update(a=shard(directory, 2).name))
    refused(directory, INDEX_FILE, "a should be in", shard(directory, 1).name)


def test_missing_shard(directory: Path) -> None:
    shard(directory, 2).unlink()
    refused(directory, "lacks 1 shard", shard(directory, 2).name)


def test_missing_shard_without_index(directory: Path) -> None:
    (directory / INDEX_FILE).unlink()
    shard(directory, 1).unlink()
    refused(directory, "lacks 1 shard", shard(directory, 1).name)


def test_dangling_link_is_a_missing_shard(directory: Path) -> None:
    shard(directory, 2).unlink()
    shard(directory, 2).symlink_to(directory / "nowhere")
    refused(directory, "lacks 1 shard", shard(directory, 2).name)


def test_duplicate_tensor_across_shards(directory: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(3), "d": torch.ones(1)}, shard(directory, 2))
    refused(
        directory, "a is stored twice", shard(directory, 1).name, shard(directory, 2).name, "byte"
    )


def test_file_that_the_index_does_not_name_is_left_out_and_said(directory: Path) -> None:
    safetensors.torch.save_file({"z": torch.ones(3)}, directory / "extra.safetensors")
    assert "extra.safetensors" in read_index(directory).notes[0]


def test_wrong_total_size_is_said(directory: Path) -> None:
    files = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
    write_index(directory, files, 71)
    assert "71" in read_index(directory).notes[0]
    assert "72" in read_index(directory).notes[0]


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "a\\b.safetensors", "..",
     "", ".safetensors", "pytorch_model.bin", "a\0.safetensors", 7, None, ["model.safetensors"]],
)  # fmt: skip
def test_index_cannot_lead_out_of_the_directory(directory: Path, file: object) -> None:
    edit_index(directory, lambda files: files.update(c=file))  # type: ignore[call-overload]
    refused(directory, INDEX_FILE, "c is in", "plain name", "byte")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {"a": "m", "a": "n"}}', "byte 16: the JSON names a twice"),
        ("\ufeff{}", "not valid JSON"),
    ],
)  # fmt: skip
def test_malformed_index(directory: Path, text: str, message: str) -> None:
    (directory / INDEX_FILE).write_text(text)
    refused(directory, INDEX_FILE, message)


def test_index_that_is_no_text(directory: Path) -> None:
    (directory / INDEX_FILE).write_bytes(b'{"a\xff')
    refused(directory, INDEX_FILE, "byte 3: not valid UTF-8")


def test_no_weights_at_all(tmp_path: Path) -> None:
    refused(tmp_path, "holds no .safetensors files")
    refused(tmp_path / "nowhere", "cannot read directory")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.gguf"])
def test_pickles_and_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    refused(tmp_path, name, "are not read")
    assert not os.path.exists("pwned")


# One message for each way in which a file can be broken.


def test_truncated_data(directory: Path) -> None:
    path = shard(directory, 2)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-6])
    refused(directory, path.name, f"byte {size - 6}", f"end at byte {size}", "6 missing")


@pytest.mark.parametrize("size", [0, 1, 7])
def test_truncated_length(directory: Path, size: int) -> None:
    path = shard(directory, 2)
    path.write_bytes(path.read_bytes()[:size])
    refused(directory, path.name, f"byte {size}: truncated")


def test_truncated_header(directory: Path) -> None:
    path = shard(directory, 2)
    path.write_bytes(path.read_bytes()[:40])
    refused(directory, path.name, "byte 40: truncated inside the header")


def test_bytes_after_the_end(directory: Path) -> None:
    path = shard(directory, 2)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"more")
    refused(directory, path.name, f"byte {size}: 4 bytes after the last tensor")


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_corrupt_header_length(directory: Path, length: int) -> None:
    path = shard(directory, 2)
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(directory, path.name, "byte 0: header length", str(length))


def test_shard_that_is_a_directory(directory: Path) -> None:
    shard(directory, 2).unlink()
    shard(directory, 2).mkdir()
    refused(directory, shard(directory, 2).name, "not a regular file")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"null", "expected a JSON object, found NoneType"),
        (b'{"\xff', "byte 10: not valid UTF-8"),
        (b"[" * 200_000, "JSON"),
        (b'{"a": {"shape": [' + b"9" * 5000 + b"]}}", "JSON"),
        (b'{"a": 1, "a": 2}', "byte 9: the JSON names a twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "names dtype twice"),
        ({"a": 1}, "byte 9: a must have exactly dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "exactly dtype"),
        ({"a": {**entry(), "more": 1}}, "exactly dtype"),
        ({"a": entry(dtype="F8_E4M3FN")}, "unknown dtype F8_E4M3FN; known are"),
        ({"a": {**entry(), "dtype": 7}}, "unknown dtype 7"),
        ({"a": entry(shape=1)}, "expected a list of sizes"),
        ({"a": entry(shape=[-1])}, "expected a list of sizes"),
        ({"a": entry(shape=[True])}, "expected a list of sizes"),
        ({"a": entry(shape=[1.0])}, "expected a list of sizes"),
        ({"a": entry(offsets=[4, 0])}, "expected [begin, end]"),
        ({"a": entry(offsets=[0])}, "expected [begin, end]"),
        ({"a": entry(offsets=[0, None])}, "expected [begin, end]"),
        ({"a": entry(offsets=[0, 2**64])}, "expected [begin, end]"),
        ({"a": entry(shape=[2])}, "takes 8 bytes, but its data_offsets span 4"),
        ({"a": entry(shape=[2**40, 2**40])}, "but its data_offsets span 4"),
        ({"a": entry("F4", [1], [0, 1])}, "takes 0.5 bytes"),
        ({"a": entry(), "b": entry()}, "b overlaps a"),
        ({"a": entry(offsets=[2, 6])}, "2 bytes between the header and a belong to no tensor"),
        ({"a": entry(), "b": entry(offsets=[6, 10])}, "2 bytes between a and b"),
        ({"a": entry(), "__metadata__": {"x": 1}}, "__metadata__ must map strings to strings"),
        ({"a": entry(), "__metadata__": []}, "__metadata__ must map strings to strings"),
        ({"a\n\x1b[31m": 1}, "'a\\n\\x1b[31m'"),
    ],
)  # fmt: skip
def test_corrupt_header(tmp_path: Path, header: object, message: str) -> None:
    path = tmp_path / "model.safetensors"
    write_header(path, header, bytes(10))
    text = refused(tmp_path, "model.safetensors, byte", message)
    assert len(text) < 400
    assert text.isprintable()


def test_a_header_for_every_byte_cut_off(tmp_path: Path) -> None:
    """No prefix of a file passes, and each is one readable sentence."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3), "b": torch.ones(2, 4)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(tmp_path, "model.safetensors", f"byte {size}")


def test_no_flipped_bit_of_a_header_escapes(tmp_path: Path) -> None:
    """A changed header is refused, or says something else that is safe to read, never a crash."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3), "b": torch.ones(2, 4)}, path)
    whole = path.read_bytes()
    for byte in range(8 + struct.unpack("<Q", whole[:8])[0]):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[byte] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                headers = read_index(tmp_path).headers
            except CheckpointError:
                continue
            assert all(h.offset_end <= len(whole) for h in headers.values())

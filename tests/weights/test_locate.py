"""MODEL to a directory, with no network."""

import json
import socket
from pathlib import Path

import pytest

from fourfold.core.errors import ModelNotFoundError
from fourfold.weights import locate as locating
from fourfold.weights.hub import cache_directory
from fourfold.weights.locate import DEFAULT_MODEL, built_in, locate, model_directory

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def hub(tmp_path: Path) -> dict[str, str]:
    """An environment whose cache holds org/name at main, v1 and refs/pr/2, as links to blobs."""
    repository = tmp_path / "home" / "hub" / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    contents = {
        "config.json": "{}",
        "model.safetensors.index.json": json.dumps({"weight_map": files}),
    }
    for name in (*contents, *files.values()):
        (blobs / name).write_text(contents.get(name, ""))
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    for ref in ("main", "v1", "refs/pr/2"):
        path = repository / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(COMMIT)
    return {"HF_HOME": str(tmp_path / "home")}


def snapshot(hub: dict[str, str]) -> Path:
    return cache_directory(hub) / "models--org--name" / "snapshots" / COMMIT


def refused(model: str, environment: dict[str, str], *parts: str, **options: bool) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        locate(model, environment=environment, **options)
    for part in parts:
        assert part in str(caught.value), caught.value
    return str(caught.value)


def test_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = locate(str(tmp_path))
    assert (found.directory, found.name, found.revision) == (tmp_path, tmp_path.name, None)


def test_directory_with_the_reference_programs_config(tmp_path: Path) -> None:
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "config.json").write_text("{}")
    assert locate(str(tmp_path)).directory == tmp_path


def test_the_built_in_name_means_the_same_in_every_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / DEFAULT_MODEL
    other.mkdir()
    (other / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    found = locate(DEFAULT_MODEL, environment={"HF_HUB_CACHE": str(tmp_path)})
    assert (found.directory, found.name, found.revision) == (built_in(), DEFAULT_MODEL, None)
    assert (built_in() / "model.safetensors.index.json").is_file()
    assert locate(f"./{DEFAULT_MODEL}").directory.resolve() == other
    assert model_directory(DEFAULT_MODEL) is model_directory("") is None
    assert model_directory(f"./{DEFAULT_MODEL}") == Path(DEFAULT_MODEL)


def test_an_installation_without_the_built_in_checkpoint_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locating.resources, "files", lambda package: tmp_path)
    message = refused(DEFAULT_MODEL, {}, "is not in this installation", str(tmp_path))
    assert "\n" not in message


def test_relative_directory_comes_before_the_cache(
    hub: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert locate("org/name", environment=hub).directory == Path("org/name")


@pytest.mark.parametrize("revision", ["", "@main", "@v1", "@refs/pr/2", f"@{COMMIT}"])
def test_snapshot_in_the_cache(hub: dict[str, str], revision: str) -> None:
    found = locate(f"org/name{revision}", environment=hub)
    assert (found.directory, found.name, found.revision) == (snapshot(hub), "org/name", COMMIT)


def test_the_cache_is_the_one_of_huggingface_hub(hub: dict[str, str]) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    theirs = huggingface_hub.snapshot_download(
        "org/name", revision="v1", cache_dir=cache_directory(hub), local_files_only=True
    )
    assert Path(theirs) == locate("org/name@v1", environment=hub).directory


def test_where_the_cache_is() -> None:
    assert cache_directory({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    assert cache_directory({"HUGGINGFACE_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    assert cache_directory({"HF_HOME": "/b"}) == Path("/b/hub")
    assert cache_directory({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert cache_directory({}) == Path("~/.cache/huggingface/hub").expanduser()
    assert cache_directory({"HF_HOME": "~/x"}) == Path("~/x/hub").expanduser()


def test_absent_model_prints_the_download_command_and_size(tmp_path: Path) -> None:
    empty = {"HF_HUB_CACHE": str(tmp_path)}
    refused(
        "deepseek-ai/DeepSeek-V4-Flash",
        empty,
        "hf download deepseek-ai/DeepSeek-V4-Flash ",
        "159.6 GB",
    )
    refused(
        "deepseek-ai/DeepSeek-V4-Pro@abc", empty,
        "hf download deepseek-ai/DeepSeek-V4-Pro --revision abc ", "864.7 GB",
    )  # fmt: skip
    refused("someone/else", empty, "hf download someone/else ", "size unknown here")


def test_absent_revision_names_the_ones_that_are_there(hub: dict[str, str]) -> None:
    refused("org/name@v2", hub, "--revision v2", f"org/name@{COMMIT}")


def test_snapshot_whose_download_was_interrupted(hub: dict[str, str]) -> None:
    (snapshot(hub) / "model-00002-of-00002.safetensors").unlink()
    refused(
        "org/name", hub, "incomplete", "hf download org/name", "model-00002-of-00002.safetensors"
    )
    assert locate("org/name", weights=False, environment=hub).revision == COMMIT


def test_snapshot_whose_blob_is_gone(hub: dict[str, str]) -> None:
    blobs = cache_directory(hub) / "models--org--name" / "blobs"
    (blobs / "model-00001-of-00002.safetensors").unlink()
    message = refused("org/name", hub, "incomplete", "model-00001-of-00002.safetensors")
    assert "model-00002" not in message


def test_snapshot_without_weights_or_config(hub: dict[str, str]) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        (snapshot(hub) / name).unlink()
    refused("org/name", hub, "incomplete", "config.json")
    for path in snapshot(hub).glob("*.safetensors"):
        path.unlink()
    refused("org/name", hub, "incomplete", "model.safetensors")


@pytest.mark.parametrize(
    "model",
    ["", "nowhere", "/no/such/directory", "./org/name", "a/b/c", "org/name@", "org/name@../../x",
     "org/..", "../name", "org/na me", "org/name@a b", "https://huggingface.co/org/name", "a\0b"],
)  # fmt: skip
def test_names_that_are_none(model: str, hub: dict[str, str]) -> None:
    message = refused(model, hub, DEFAULT_MODEL)
    assert "\n" not in message


def test_file_and_directory_without_config(tmp_path: Path) -> None:
    refused(str(tmp_path), {}, "holds no config.json")
    (tmp_path / "model.gguf").write_text("")
    refused(str(tmp_path / "model.gguf"), {}, "is a file")

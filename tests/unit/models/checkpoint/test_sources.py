"""Names become files, and whatever is wrong with them has a type, a sentence and a hint."""

import contextlib
import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open

from petals.errors import (
    ModelFilesBroken,
    ModelNotFound,
    ModelNotSupported,
    NotEnoughDisk,
    PickleCheckpointRefused,
)
from petals.models.adapters.files import base_of_adapter
from petals.models.checkpoint import hub as hub_module
from petals.models.checkpoint import sources
from petals.models.checkpoint.hub import HubAccess
from petals.models.checkpoint.sources import open_checkpoint
from petals.models.loading.split import LoadOptions, load_blocks
from petals.testing.tiny_models import PUBLISHED
from petals.types import BlockSpan
from support.models import WriteModel


class FakeHub:
    """A hub of one folder per repository; remembers what was asked of it."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.downloaded: list[str] = []
        self.error: Exception | None = None

    def exists(self, repo: str, file_name: str, **access: object) -> bool:
        return (self.repositories[repo] / file_name).is_file()

    def download(self, repo: str, file_name: str, **access: object) -> str:
        if self.error is not None:
            raise self.error
        answer = SimpleNamespace(headers={}, request=None)
        if repo not in self.repositories:
            raise RepositoryNotFoundError("no such repository", response=answer)
        if access["revision"] == "nowhere":
            raise RevisionNotFoundError("no such revision", response=answer)
        path = self.repositories[repo] / file_name
        if not path.is_file():
            raise RemoteEntryNotFoundError("no such file", response=answer)
        self.downloaded.append(file_name)
        return str(path)

    def header(self, repo: str, file_name: str, **access: object) -> SimpleNamespace:
        path = self.repositories[repo] / file_name
        if not path.is_file():
            raise RemoteEntryNotFoundError(
                "no such file", response=SimpleNamespace(headers={}, request=None)
            )
        with safe_open(path, framework="pt") as file:
            return SimpleNamespace(tensors=dict.fromkeys(file.keys()))


@pytest.fixture
def hub(tiny_folder: WriteModel, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    bloom = tiny_folder("bloom", PUBLISHED["bloom"])
    hub = FakeHub({"bigscience/bloom": bloom, "someone/tiny": tiny_folder("llama")})
    monkeypatch.setattr(hub_module, "hf_hub_download", hub.download)
    monkeypatch.setattr(hub_module, "file_exists", hub.exists)
    monkeypatch.setattr(hub_module, "parse_safetensors_file_metadata", hub.header)
    monkeypatch.setattr(hub_module, "_probe", lambda *where: None)
    return hub


def test_only_needed_files_are_downloaded(hub: FakeHub) -> None:
    load_blocks("bigscience/bloom", BlockSpan(2, 3))
    weights = {name for name in hub.downloaded if name.endswith(".safetensors")}
    weight_map = open_checkpoint("bigscience/bloom").weight_map
    assert weights == {file for name, file in weight_map.items() if name.startswith("h.2.")}
    assert len(weights) < PUBLISHED["bloom"].num_shards // 2


def test_old_names_give_one_notice(
    hub: FakeHub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_announced_aliases", set())
    with caplog.at_level(logging.WARNING, logger="petals"):
        names = [open_checkpoint("bigscience/bloom-petals").name for _ in range(2)]
    assert names == ["bigscience/bloom"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "bigscience/bloom-petals is an old name: using bigscience/bloom"
    ]


@pytest.mark.parametrize(
    ("source", "revision", "reason"),
    [
        ("someone/unknown", None, "neither a folder here nor a repository .*spelling"),
        ("no-such-folder", None, "neither a folder here nor a repository .*spelling"),
        ("./no/such/folder/anywhere", None, ""),
        ("someone/tiny", "nowhere", "no revision nowhere"),
    ],
)
def test_unknown_names(source: str, revision: str | None, reason: str, hub: FakeHub) -> None:
    with pytest.raises(ModelNotFound, match=f"(?s){reason}"):
        open_checkpoint(source, HubAccess(revision=revision))


def test_hub_out_of_reach(hub: FakeHub) -> None:
    hub.error = LocalEntryNotFoundError("no connection")
    with pytest.raises(ModelNotFound, match="cannot be reached") as caught:
        open_checkpoint("someone/tiny")
    assert "HF_HUB_OFFLINE" in caught.value.hint


def test_disk_full_while_downloading(hub: FakeHub) -> None:
    hub.error = OSError(28, "No space left on device")
    with pytest.raises(NotEnoughDisk, match="full") as caught:
        open_checkpoint("someone/tiny")
    assert "HF_HOME" in caught.value.hint


@pytest.mark.parametrize("asked", [True, False], ids=["asked to be", "without a network"])
def test_offline_from_the_cache(
    asked: bool, tiny_folder: WriteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", asked)
    monkeypatch.setattr(hub_module, "_probe", lambda *where: "it does not answer")
    commit = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_folder("llama"), repository / "snapshots" / commit)
    access = HubAccess(cache_dir=str(tmp_path))
    loaded = load_blocks("someone/tiny", BlockSpan(0, 1), LoadOptions(access=access))
    assert loaded.blocks == BlockSpan(0, 1)
    with pytest.raises(ModelNotFound, match="not in the cache"):
        open_checkpoint("someone/other", access)


def test_the_names_of_a_single_file_are_read_without_its_weights(hub: FakeHub) -> None:
    assert len(open_checkpoint("someone/tiny").weight_map) > 40
    assert hub.downloaded == ["config.json"]


@pytest.fixture
def dead_end(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a proxy: a closed port, it never answers, or it cannot reach the hub."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if request.param == "closed":
            yield address
            return
        listener.listen()
        if request.param == "unavailable":
            thread = threading.Thread(target=refuse_all, args=(listener,), daemon=True)
            thread.start()
        yield address
        listener.shutdown(socket.SHUT_RDWR)


def refuse_all(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            stream, _ = listener.accept()
            with stream:
                stream.recv(4096)
                stream.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize("dead_end", ["closed", "mute", "unavailable"], indirect=True)
@pytest.mark.parametrize("is_proxy", [True, False], ids=["proxy", "hub"])
def test_a_dead_proxy_is_told_in_seconds(
    dead_end: str, is_proxy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "PROBE_SECONDS", 0.3)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if is_proxy:
        monkeypatch.setenv("https_proxy", dead_end)
    else:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", dead_end)
    huggingface_hub.close_session()  # the client remembers its proxies
    started = time.monotonic()
    with pytest.raises(ModelNotFound, match="someone/unknown .*cannot be reached: http"):
        open_checkpoint("someone/unknown", HubAccess(cache_dir=str(tmp_path)))
    assert time.monotonic() - started < 3
    huggingface_hub.close_session()


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_broken_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFilesBroken, match=r"config\.json"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "brand_new"}, "does not know the model type 'brand_new'"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "c.C"}}, "trust_remote_code"),
    ],
)
def test_foreign_code_is_refused(settings: dict, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "c.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelNotSupported, match=reason):
        open_checkpoint(str(tmp_path))


@pytest.fixture
def bare(tiny_folder: WriteModel, tmp_path: Path) -> Path:
    """The folder of a model without weights."""
    shutil.copy(tiny_folder("llama") / "config.json", tmp_path)
    return tmp_path


def test_pickle_is_refused_with_the_command(bare: Path) -> None:
    torch.save({}, bare / "pytorch_model.bin")
    with pytest.raises(PickleCheckpointRefused) as caught:
        load_blocks(str(bare), BlockSpan(0, 1))
    assert caught.value.hint.endswith(f"petals models convert {bare} {bare.name}-safetensors")


def test_pickle_on_the_hub_is_refused_before_it_is_downloaded(hub: FakeHub, bare: Path) -> None:
    torch.save({}, bare / "pytorch_model.bin")
    hub.repositories["someone/old"] = bare
    with pytest.raises(PickleCheckpointRefused) as caught:
        load_blocks("someone/old", BlockSpan(0, 1))
    assert caught.value.hint.endswith("petals models convert someone/old old-safetensors")
    assert hub.downloaded == ["config.json"]


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        (None, "no safetensors weights"),
        ("../secret.safetensors", "not a safetensors file beside it"),
        ("/etc/passwd", "not a safetensors file beside it"),
        ("model.bin", "not a safetensors file beside it"),
    ],
)
def test_weights_that_are_nowhere_or_elsewhere(listed: str | None, reason: str, bare: Path) -> None:
    if listed is not None:
        index = {"weight_map": {"model.norm.weight": listed}}
        (bare / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFilesBroken, match=reason):
        load_blocks(str(bare), BlockSpan(0, 1))


def test_missing_shard(edited: WriteModel) -> None:
    folder = edited("bloom", published=True)
    for path in folder.glob("model-*"):
        path.unlink()
    with pytest.raises(ModelFilesBroken, match="the file is missing"):
        load_blocks(str(folder), BlockSpan(0, 1))


def test_model_id_of_a_repository(hub: FakeHub) -> None:
    assert open_checkpoint("someone/tiny").model_id == "someone--tiny"
    assert open_checkpoint("bigscience/bloom-petals").model_id == "bigscience--bloom"
    branch = open_checkpoint("someone/tiny", HubAccess(revision="v2"))
    assert branch.model_id == "someone--tiny@v2"


def test_model_id_of_a_folder_follows_its_settings(edited: WriteModel) -> None:
    first = open_checkpoint(str(edited("llama"))).model_id
    newer = edited("llama", transformers_version="6.0")
    assert open_checkpoint(f"{newer}/").model_id == first
    assert open_checkpoint(str(edited("llama", rms_norm_eps=0.5))).model_id != first


def test_model_id(hub: FakeHub, tiny_folder: WriteModel, tmp_path: Path) -> None:
    assert open_checkpoint("someone/tiny").model_id == "someone--tiny"
    assert open_checkpoint("bigscience/bloom-petals").model_id == "bigscience--bloom"
    branch = open_checkpoint("someone/tiny", HubAccess(revision="v2"))
    assert branch.model_id == "someone--tiny@v2"
    folder = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(tiny_folder("llama"), folder)
    first = open_checkpoint(str(folder)).model_id
    settings = json.loads((folder / "config.json").read_text())
    settings["transformers_version"] = "6.0"
    (folder / "config.json").write_text(json.dumps(settings))
    assert open_checkpoint(str(folder) + "/").model_id == first
    settings["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(settings))
    assert open_checkpoint(str(folder)).model_id != first


class TestAccess:
    """The arguments of transformers that say where files are and how to get them."""

    def test_a_subfolder_of_a_repository(self, hub: FakeHub, tiny_folder: WriteModel) -> None:
        hub.repositories["someone/many"] = tiny_folder("llama").parent
        subfolder = tiny_folder("llama").name
        access = HubAccess(subfolder=subfolder)
        checkpoint = open_checkpoint("someone/many", access)
        assert checkpoint.model_id == f"someone--many--{subfolder}"
        assert load_blocks(checkpoint, BlockSpan(0, 1)).blocks == BlockSpan(0, 1)
        assert all(name.startswith(f"{subfolder}/") for name in hub.downloaded)
        with pytest.raises(ModelNotFound, match=r"no config\.json"):
            open_checkpoint("someone/many", HubAccess(subfolder="none"))

    def test_force_download_reaches_the_hub_once_for_each_file(
        self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forced: list[object] = []

        def download(repo: str, file_name: str, **access: object) -> str:
            forced.append(access["force_download"])
            return hub.download(repo, file_name, **access)

        monkeypatch.setattr(hub_module, "hf_hub_download", download)
        for wanted in (True, False):
            forced.clear()
            hub.downloaded.clear()
            checkpoint = open_checkpoint("someone/tiny", HubAccess(force_download=wanted))
            load_blocks(checkpoint, BlockSpan(0, 1))
            assert set(forced) == {wanted}
            assert len(hub.downloaded) == len(set(hub.downloaded))

    def test_an_adapter_is_looked_for_behind_the_model(
        self, hub: FakeHub, tiny_folder: WriteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "adapter_config.json").write_text(
            '{"base_model_name_or_path": "someone/tiny", "peft_type": "LORA"}'
        )
        hub.repositories["someone/lora"] = tmp_path
        assert base_of_adapter("someone/lora") == "someone/tiny"
        assert base_of_adapter("someone/tiny") is None
        shutil.copy(tiny_folder("llama") / "config.json", tmp_path)
        assert base_of_adapter("someone/lora") == "someone/tiny"
        assert base_of_adapter(str(tmp_path)) == str(tmp_path)
        with pytest.raises(ModelNotFound, match="neither"):
            base_of_adapter("someone/unknown")

        def cached_only(repo: str, file_name: str, **access: object) -> str:
            if file_name != "config.json":
                raise LocalEntryNotFoundError("no connection")
            return hub.download(repo, file_name, **access)

        monkeypatch.setattr(hub_module, "hf_hub_download", cached_only)
        assert base_of_adapter("someone/tiny") is None

    def test_local_files_only_asks_no_hub(self, tmp_path: Path) -> None:
        access = HubAccess(cache_dir=str(tmp_path), local_files_only=True)
        with pytest.raises(ModelNotFound, match="local_files_only"):
            open_checkpoint("someone/tiny", access)

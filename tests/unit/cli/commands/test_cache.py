"""`petals pull`, `ls` and `rm` with a hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from petals.testing.tiny_models import write_tiny_model
from support.hub_server import HubServer, hub_of
from support.pty_terminal import on_a_terminal
from support.tiny_tokenizer import write_tokenizer

NAME = "someone/tiny"
Petals = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """It has one model of four blocks, with about one file for a block and one for each end."""
    root, whole = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("whole")
    folder = root / NAME
    write_tiny_model(whole, "llama", num_hidden_layers=4)
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder, max_shard_size="20KB")
    write_tokenizer(folder)
    with hub_of(root) as server:
        yield server


@pytest.fixture
def environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    hub.asked.clear()
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "PETALS_CACHE": str(tmp_path / "petals"),
    }


@pytest.fixture
def petals(environment: dict[str, str]) -> Petals:
    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "petals.cli", *words]
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )

    return run


def weights(hub: HubServer) -> set[str]:
    """Weight files that were downloaded since the last look."""
    found = {name for name in hub.asked if name.endswith(".safetensors")}
    hub.asked.clear()
    return found


def files_with(hub: HubServer, *parts: str) -> set[str]:
    index = json.loads((hub.root / NAME / "model.safetensors.index.json").read_text())
    return {file for key, file in index["weight_map"].items() if key.startswith(parts)}


@pytest.mark.slow
def test_pull_downloads_what_is_needed_and_no_more(petals: Petals, hub: HubServer) -> None:
    everything = set(files_with(hub, ""))
    span = files_with(hub, "model.layers.1.", "model.layers.2.")
    assert petals("pull", NAME, "--blocks", "1:3").returncode == 0
    assert weights(hub) == span < everything

    ends = files_with(hub, "model.embed_tokens", "model.norm", "lm_head")
    client = petals("pull", NAME, "--client")
    assert weights(hub) == ends - span
    assert (Path(client.stdout.strip()) / "tokenizer.json").is_file()

    assert petals("pull", NAME).returncode == 0
    assert weights(hub) == everything - span - ends
    petals("pull", NAME)
    assert weights(hub) == set(), "all of it is in the cache"

    listed = json.loads(petals("ls", "--json").stdout)["models"]
    (model,) = listed
    sizes = [file.stat().st_size for file in (hub.root / NAME).iterdir()]
    assert model["name"] == NAME and model["size_bytes"] == sum(sizes)


def test_ls_and_rm(
    petals: Petals, hub: HubServer, environment: dict[str, str], tmp_path: Path
) -> None:
    assert "No models" in petals("ls").stderr
    snapshot = tmp_path / "hf" / "hub" / "models--someone--tiny" / "snapshots" / "1"
    shutil.copytree(hub.root / NAME, snapshot)
    converted = tmp_path / "petals" / "models" / "Converted"
    shutil.copytree(hub.root / NAME, converted)
    heads, *rows = petals("ls").stdout.splitlines()
    assert heads.split() == ["MODEL", "SIZE", "LAST", "USED"]
    assert [row.split()[0] for row in rows] == ["Converted", NAME]

    asked = petals("rm", NAME)
    assert asked.returncode == 2 and "--yes" in asked.stderr
    assert petals("rm", "someone/none", "--yes").returncode == 2
    command = [sys.executable, "-m", "petals.cli", "rm", "Converted"]
    with on_a_terminal(command, environment) as terminal:
        terminal.expect("Remove 1 model")
        terminal.type("n\r")
        assert terminal.wait() == 1
    assert converted.is_dir()
    with on_a_terminal(command, environment) as terminal:
        terminal.expect("Remove 1 model")
        terminal.type("y\r")
        assert terminal.wait() == 0
    assert not converted.exists()
    assert petals("rm", NAME, "--yes").returncode == 0
    assert petals("ls", "--json").stdout.split() == ["{", '"models":', "[]", "}"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("pull", "someone/none"), "neither a folder here nor a repository"),
        (("pull", NAME, "--blocks", "3:9"), "has blocks 0:4, not 3:9"),
        (("pull", "."), "has no config.json"),
    ],
)
def test_what_cannot_be_pulled(petals: Petals, words: tuple[str, ...], error: str) -> None:
    result = petals(*words)
    assert result.returncode == 2 and result.stdout == ""
    assert error in result.stderr and "hint: " in result.stderr


def test_a_download_is_drawn_on_a_terminal(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "petals.cli", "pull", NAME, "--blocks", "1:2"]
    with on_a_terminal(command, environment) as terminal:
        assert terminal.wait() == 0
    assert "File 1 of" in terminal.text and "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in terminal.text

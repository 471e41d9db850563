"""Every example runs as printed, on a short setting, through a swarm of real servers."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

from petals.testing.local_swarm import LocalSwarm

EXAMPLES = Path(__file__).parents[2] / "examples"
TUTORIALS = ("prompt_tuning_sst2", "prompt_tuning_personachat")


def run(name: str, swarm: LocalSwarm, folder: Path, *more: str) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *more]
    command += ["--model", swarm.config.model, "--join", swarm.initial_peers[0], "--short"]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", TUTORIALS)
def test_notebooks_say_what_scripts_do(name: str) -> None:
    script = jupytext.read(EXAMPLES / f"{name}.py")
    notebook = jupytext.read(EXAMPLES / f"{name}.ipynb")

    def cells(book: object) -> list[tuple[str, str]]:
        return [(cell.cell_type, cell.source) for cell in book.cells]

    assert cells(notebook) == cells(script), f"jupytext --sync examples/{name}.py"
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_sentiment(smollm2_swarm: LocalSwarm, tmp_path: Path) -> None:
    result = tmp_path / "result.md"
    said = run("prompt_tuning_sst2", smollm2_swarm, tmp_path, "--result", str(result))
    assert "step 2 of 2" in said
    (line,) = [line for line in result.read_text().splitlines() if "largest difference" in line]
    assert float(line.split()[-1]) < 1e-4
    assert (tmp_path / "tuned-sst2" / "model.safetensors").is_file()


def test_persona(smollm2_swarm: LocalSwarm, tmp_path: Path) -> None:
    result = tmp_path / "result.md"
    run("prompt_tuning_personachat", smollm2_swarm, tmp_path, "--result", str(result))
    assert result.read_text().count("> Are you ever sad?") == 2
    assert (tmp_path / "tuned-persona" / "model.safetensors").is_file()


def test_hidden_states(smollm2_swarm: LocalSwarm, tmp_path: Path) -> None:
    said = run("hidden_states", smollm2_swarm, tmp_path)
    assert "after  0 blocks" in said and "after 30 blocks" in said


def test_custom_path(smollm2_swarm: LocalSwarm, tmp_path: Path) -> None:
    said = run("custom_path", smollm2_swarm, tmp_path)
    assert "Paris" in next(line for line in said.splitlines() if line.startswith("all blocks"))
    assert "step 1: loss" in said


def test_lora_adapter(smollm2_swarm: LocalSwarm, tmp_path: Path) -> None:
    said = run("lora_adapter", smollm2_swarm, tmp_path)
    assert "step 2: loss" in said
    apart = said.splitlines()[-1]
    assert apart.startswith("peft's logits differ") and float(apart.split()[-1]) < 1e-2

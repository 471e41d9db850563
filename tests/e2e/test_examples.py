"""Every example runs as printed, on a short setting, through a swarm of real servers."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import jupytext
import pytest

from petals.testing.local_swarm import LocalSwarm

EXAMPLES = Path(__file__).parents[2] / "examples"
TUTORIALS = ("prompt_tuning_sst2", "prompt_tuning_personachat")


@pytest.fixture
def run(
    smollm2_swarm: LocalSwarm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Runs an example as `python examples/NAME.py` would, but where torch is imported already."""

    def run(name: str, *more: str) -> str:
        script = str(EXAMPLES / f"{name}.py")
        swarm = ("--model", smollm2_swarm.config.model, "--join", smollm2_swarm.initial_peers[0])
        monkeypatch.setattr(sys, "argv", [script, *more, *swarm, "--short"])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", TUTORIALS)
def test_notebooks_say_what_scripts_do(name: str) -> None:
    script = jupytext.read(EXAMPLES / f"{name}.py")
    notebook = jupytext.read(EXAMPLES / f"{name}.ipynb")

    def cells(book: object) -> list[tuple[str, str]]:
        return [(cell.cell_type, cell.source) for cell in book.cells]

    assert cells(notebook) == cells(script), f"jupytext --sync examples/{name}.py"
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_sentiment(run: Callable[..., str], tmp_path: Path) -> None:
    result = tmp_path / "result.md"
    said = run("prompt_tuning_sst2", "--result", str(result))
    assert "step 2 of 2" in said
    (line,) = [line for line in result.read_text().splitlines() if "largest difference" in line]
    assert float(line.split()[-1]) < 1e-4
    assert (tmp_path / "tuned-sst2" / "model.safetensors").is_file()


def test_persona(run: Callable[..., str], tmp_path: Path) -> None:
    result = tmp_path / "result.md"
    run("prompt_tuning_personachat", "--result", str(result))
    assert result.read_text().count("> Are you ever sad?") == 2
    assert (tmp_path / "tuned-persona" / "model.safetensors").is_file()


def test_hidden_states(run: Callable[..., str]) -> None:
    said = run("hidden_states")
    assert "after  0 blocks" in said and "after 30 blocks" in said


def test_custom_path(run: Callable[..., str]) -> None:
    said = run("custom_path")
    assert "Paris" in next(line for line in said.splitlines() if line.startswith("all blocks"))
    assert "step 1: loss" in said


def test_lora_adapter(run: Callable[..., str]) -> None:
    said = run("lora_adapter")
    assert "step 2: loss" in said
    apart = said.splitlines()[-1]
    assert apart.startswith("peft's logits differ") and float(apart.split()[-1]) < 1e-2

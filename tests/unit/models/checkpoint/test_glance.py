"""A wrong span is refused from the config file alone, in whichever words it gives its layers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from petals.errors import BlocksNotServed
from petals.models.checkpoint.arch import describe
from petals.models.checkpoint.glance import check_blocks, glance_at_blocks
from petals.models.verify.tiny import tiny_config
from petals.types import BlockSpan
from support.models import WriteModel

PLAIN = "llama mixtral deepseek_v3 gemma2 gpt_oss qwen3_next falcon gptj gpt2 bloom mpt opt".split()
NESTED = "gemma3 llama4 mistral3".split()


@pytest.mark.parametrize("model_type", [*PLAIN, *NESTED])
def test_the_number_is_that_of_transformers(model_type: str, tmp_path: Path) -> None:
    config = tiny_config(model_type)
    config.save_pretrained(tmp_path)
    assert glance_at_blocks(str(tmp_path)) == describe(config).num_blocks


@pytest.mark.parametrize(
    "settings", [{}, [], {"num_layers": 3, "n_layer": 4}, {"num_hidden_layers": "5"}]
)
def test_what_is_not_plain_is_left_to_the_start(settings: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert glance_at_blocks(str(tmp_path)) is None


@pytest.mark.parametrize("model", ["./none", "someone/unknown", "not a name", "~"])
def test_without_a_config_here(model: str, tmp_path: Path) -> None:
    assert glance_at_blocks(model, cache_dir=str(tmp_path)) is None


def test_a_repository_in_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "models--someone--tiny"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    tiny_config("llama").save_pretrained(snapshot)
    assert glance_at_blocks("someone/tiny", cache_dir=str(tmp_path)) == 5


def test_only_blocks_of_the_model() -> None:
    check_blocks("tiny", BlockSpan(0, 5), 5)
    with pytest.raises(BlocksNotServed, match="tiny has blocks 0:5, not 3:6") as caught:
        check_blocks("tiny", BlockSpan(3, 6), 5)
    assert "0:5" in caught.value.hint


def test_serve_refuses_a_wrong_span_before_it_imports_torch(tiny_folder: WriteModel) -> None:
    folder = tiny_folder("llama")
    script = (
        "import sys\n"
        "from petals.cli.main import app\n"
        "from petals.cli.terminal.console import run_as_command\n"
        f"try: run_as_command(lambda: app(['serve', {str(folder)!r}, '--blocks', '3:9']))\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (2, ["False", "False"])
    assert "has blocks 0:5, not 3:9" in " ".join(done.stderr.split())

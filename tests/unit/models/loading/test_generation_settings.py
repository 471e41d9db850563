"""A client's generation settings are those that transformers gives the same checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from petals.errors import ModelFilesBroken
from petals.models.loading.head import GENERATION_FILE, HeadKind, load_client_part
from support.models import WriteModel

CANDIDATES = (3, 0.5, True, [5], [[5, 6]], [[[5], 0.5]], "never")
"""Values of the kinds that generation settings have; the first that transformers takes is used."""


def ours(folder: Path) -> dict[str, Any]:
    ends = load_client_part(str(folder), HeadKind.CAUSAL_LM, lambda arch, config: nn.ModuleList())
    return ends.generation_config.to_dict()


def stock(folder: Path) -> dict[str, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).generation_config.to_dict()


def refusal(config: Path, settings: dict[str, Any]) -> str | None:
    """Why transformers does not load a model with these settings in its config; None if it does."""
    config.write_text(json.dumps(settings))
    try:
        stock(config.parent)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", sorted(set(GenerationConfig().to_dict()) - {"use_cache"}))
def test_every_setting_in_the_config_is_honoured(edited: WriteModel, name: str) -> None:
    folder = edited("llama")
    (folder / GENERATION_FILE).unlink(missing_ok=True)
    config = folder / "config.json"
    settings = json.loads(config.read_text())
    taken = next((v for v in CANDIDATES if refusal(config, settings | {name: v}) is None), None)
    config.write_text(json.dumps(settings | {name: taken}))
    assert ours(folder) == stock(folder)


def test_a_generation_config_comes_before_the_config(edited: WriteModel) -> None:
    folder = edited("llama", repetition_penalty=1.3, num_beams=2)
    (folder / GENERATION_FILE).write_text('{"num_beams": 3}')
    assert ours(folder) == stock(folder)
    assert ours(folder)["num_beams"] == 3


@pytest.mark.parametrize("broken", [b"", b"{", b"\xff\xfe", b"<html>not found</html>"])
def test_of_a_broken_generation_config_the_configs_settings_are_left(
    edited: WriteModel, broken: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder = edited("llama", repetition_penalty=1.3)
    (folder / GENERATION_FILE).write_bytes(broken)
    found = ours(folder)
    assert found == stock(folder)
    assert found["repetition_penalty"] == 1.3
    assert "is no JSON file" in caplog.text


@pytest.mark.parametrize("refused", ["[1]", "3", '{"max_new_tokens": "a"}'])
def test_settings_that_transformers_refuses_are_refused_by_name(
    edited: WriteModel, refused: str
) -> None:
    folder = edited("llama")
    (folder / GENERATION_FILE).write_text(refused)
    with pytest.raises((ValueError, TypeError)):
        stock(folder)
    with pytest.raises(ModelFilesBroken, match=rf"settings in {GENERATION_FILE} of"):
        ours(folder)


def test_a_config_that_transformers_cannot_build_is_refused_by_name(edited: WriteModel) -> None:
    folder = edited("llama", cache_implementation=3)
    with pytest.raises(ModelFilesBroken, match="cannot build a LlamaForCausalLM .*cache_impl"):
        ours(folder)

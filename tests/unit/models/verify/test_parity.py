import math
from dataclasses import replace

import pytest

from petals.models.runtime.batch import Segment
from petals.models.verify import client_side, parity_check
from petals.models.verify.parity import Limits, architectures, check, to_markdown
from petals.models.verify.parity_check import VARIANTS, ParityRow, check_architecture
from petals.models.verify.self_test import LENGTHS
from petals.models.verify.tiny import tiny_config

QUICK = ["llama", "bloom", "falcon (alibi)", "gptj", "opt", "gemma2", "deepseek_v3", "gpt_oss"]
ONE_BY_ONE = ["qwen3_next", "lfm2"]


@pytest.mark.parametrize("name", QUICK)
def test_these_are_exact_and_packed(name: str) -> None:
    row = check_architecture(name)
    assert row.exact, row
    assert row.mode == "packed"


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_recurrent_hybrids_are_exact_one_by_one(name: str) -> None:
    row = check_architecture(name)
    assert row.exact, row
    assert row.mode == "one by one"
    assert "recurrent" in row.reason


@pytest.mark.parametrize(
    ("name", "reason"), [("gemma3n_text", "per-layer"), ("bart", "encoder"), ("nonsense", "know")]
)
def test_what_cannot_work_says_why(name: str, reason: str) -> None:
    row = check_architecture(name)
    assert not row.mode and not row.exact
    assert reason in row.reason


@pytest.mark.parametrize("name", ["llama", "phi3", "phimoe", "gemma3_text", "qwen3_next"])
def test_rope_factors_that_depend_on_the_length_are_checked(name: str) -> None:
    assert check_architecture(name).scaled < parity_check.EXACT


def test_factors_of_pieces_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segment, "given_rope_lengths", property(lambda s: (s.end,) * len(s.hidden)))
    assert "differ" in check_architecture("llama").reason


def test_texts_are_longer_than_every_limit_of_a_tiny_model() -> None:
    limits = ("original_max_position_embeddings", "sliding_window", "attention_chunk_size")
    for name in architectures():
        model_type, overrides = VARIANTS.get(name, (name, {}))
        try:
            config = tiny_config(model_type, **overrides).get_text_config(decoder=True)
        except Exception:  # a type whose tiny config cannot be built is a row of the table
            continue
        for limit in (*limits, "index_topk", "window_size"):
            value = getattr(config, limit, None)
            assert not isinstance(value, int) or value < min(LENGTHS), (name, limit, value)


def test_a_client_that_cannot_load_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> int:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(client_side, "layer_tuple_size", fail)
    assert "a client cannot load it" in check_architecture("llama").reason


def test_a_lost_tensor_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    load = parity_check.load_blocks

    def load_and_lose(*args: object) -> object:
        loaded = load(*args)
        next(iter(loaded.layers[-1].parameters())).zero_()
        return loaded

    monkeypatch.setattr(parity_check, "load_blocks", load_and_lose)
    assert not check_architecture("llama").exact


def test_every_architecture_of_the_issue_is_listed() -> None:
    listed = set(architectures())
    assert {"bloom", "mixtral", "deepseek_v3", "falcon (alibi)", "minimax_m2"} <= listed


def test_the_table_counts_what_is_exact() -> None:
    good = ParityRow(name="a", mode="packed", prefill=0.0, decode=1e-7, mixed=2e-7, client=0.0)
    bad = replace(good, name="b", decode=1e-4)
    unscaled = replace(good, name="d", scaled=1e-4)
    unloaded = replace(good, name="e", client=math.nan)
    refused = ParityRow(name="c", reason="it is | odd")
    table = to_markdown([refused, bad, good])
    assert table.startswith("1 of 3 ")
    assert "| a | yes | packed | 0e+00 | 1e-07 | 2e-07 | - | 0e+00 |  |" in table
    assert not unscaled.exact and not unloaded.exact
    assert "| b | no |" in table
    assert "| c | it is / odd |" in table
    assert math.isnan(refused.prefill)


@pytest.mark.slow
def test_an_architecture_that_hangs_costs_one_row() -> None:
    seen = []
    (row,) = check(["llama"], lambda *news: seen.append(news), Limits(seconds=0.01))
    assert row.name == "llama" and "took longer" in row.reason
    assert seen == [(0, 1, "llama")]


@pytest.mark.slow
def test_the_worker_checks_like_we_do() -> None:
    (row,) = check(["gpt2"])
    assert row.exact and row.mode == "packed"

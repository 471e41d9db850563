import math

import pytest

from petals.models.verify import parity_check
from petals.models.verify.parity import Limits, architectures, check, to_markdown
from petals.models.verify.parity_check import ParityRow, check_architecture

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
    good = ParityRow(name="a", mode="packed", prefill=0.0, decode=1e-7, mixed=2e-7)
    bad = ParityRow(name="b", mode="packed", prefill=0.0, decode=1e-4, mixed=2e-7)
    refused = ParityRow(name="c", reason="it is | odd")
    table = to_markdown([refused, bad, good])
    assert table.startswith("1 of 3 ")
    assert "| a | yes | packed | 0e+00 | 1e-07 | 2e-07 |  |" in table
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

"""Continuing a session: in turns, without input, rolled back, after beams, after plain steps."""

import asyncio
import signal
import threading

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from petals.errors import BadInput, LengthExceeded, MissingBlocksError, NotSupported
from support.local_blocks import tiny_pair

PROMPT = torch.tensor([[11, 54, 7, 33, 54, 23, 90]])
REPLY = torch.tensor([[8, 41, 77]])


@pytest.fixture(scope="module")
def pair():
    return tiny_pair("bloom")


@pytest.fixture
def local(pair):
    return pair[0]


@pytest.fixture
def remote(pair):
    pair[1].remote_blocks.runner.sessions.clear()
    return pair[1]


def greedy(model, ids, num_tokens, **options):
    return model.generate(ids, max_new_tokens=num_tokens, use_cache=True, **options)


def joined(*parts):
    return torch.cat(parts, dim=1)


def test_turns_are_one_long_conversation(local, remote):
    with remote.inference_session(max_length=40) as session:
        first = remote.generate(PROMPT, max_new_tokens=4)
        second = remote.generate(REPLY, max_new_tokens=4)
        third = remote.generate(None, max_new_tokens=3)
    assert torch.equal(first, greedy(local, PROMPT, 4))
    whole = greedy(local, joined(first, REPLY), 7)
    assert torch.equal(second, whole[:, first.shape[1] : -3])  # the reply and its continuation
    assert torch.equal(third, whole[:, -3:])  # only what is new
    assert torch.equal(session.output_ids, whole)
    assert session.position == whole.shape[1] - 1
    (rows,) = remote.remote_blocks.runner.sessions
    assert sum(counts[0] for _, counts, _ in rows.steps) == session.position, "a token ran twice"


@pytest.mark.parametrize(
    ("common", "first", "rest", "num_rows"),
    [
        ({"repetition_penalty": 3.0}, {}, {}, None),  # penalties see the whole history
        ({"prompt_lookup_num_tokens": 4}, {}, {}, None),
        ({}, {"num_beams": 3}, {}, None),
        ({}, {"num_beams": 3, "num_return_sequences": 2}, {}, None),
        ({}, {"num_beams": 3}, {}, 3),  # in rows that were reserved for the beams
        ({}, {}, {"num_beams": 3}, None),
        ({}, {"do_sample": True, "num_return_sequences": 3}, {}, None),
    ],
    ids=["penalty", "lookup", "beams", "2 of 3 beams", "reserved", "beams later", "samples"],
)
def test_a_second_call_continues_the_first(local, remote, common, first, rest, num_rows):
    torch.manual_seed(3)
    expected = local.generate(PROMPT, max_new_tokens=4, use_cache=True, **common, **first)
    torch.manual_seed(3)
    with remote.inference_session(max_length=40, num_rows=num_rows) as session:
        assert (session.num_rows, session.lengths) == (num_rows, ())
        begun = remote.generate(PROMPT, max_new_tokens=4, **common, **first)
        ended = remote.generate(None, max_new_tokens=8, **common, **rest)
    assert torch.equal(begun, expected)
    assert torch.equal(joined(begun, ended), greedy(local, begun, 8, **common, **rest))


def test_a_session_from_outside(local, remote):
    session = remote.remote_blocks.open_session(max_length=40)
    with remote.use_session(session):
        first = remote.generate(PROMPT, max_new_tokens=2)
    assert remote.active_session is None
    with remote.use_session(session):
        second = remote.generate(None, max_new_tokens=2)
    assert torch.equal(joined(first, second), greedy(local, PROMPT, 4))
    with remote.use_session(None) as nothing:
        assert nothing is None


def test_a_session_as_an_argument(local, remote):
    with remote.remote_blocks.inference_session(max_length=40) as session:
        first = remote.generate(PROMPT, max_new_tokens=4, session=session)
        assert remote.active_session is session
        rest = remote.generate(max_new_tokens=4, session=session)
    assert remote.active_session is None
    assert torch.equal(joined(first, rest), greedy(local, PROMPT, 8))


def test_max_length_counts_the_whole_session(remote):
    with remote.inference_session(max_length=40) as session:
        remote.generate(PROMPT, max_new_tokens=3)
        assert remote.generate(None, max_length=12).shape == (1, 2)
        assert session.output_ids.shape == (1, 12)


def test_generation_continues_at_a_position_that_was_set_back(local, remote):
    with remote.inference_session(max_length=40) as session:
        first = remote.generate(PROMPT, max_new_tokens=6)
        session.position = 9
        again = remote.generate(REPLY, max_new_tokens=3)
        session.position = 9
        same = remote.generate(None, max_new_tokens=2)
    kept = first[:, :9]
    assert torch.equal(again, greedy(local, joined(kept, REPLY), 3)[:, 9:])
    assert torch.equal(same, greedy(local, kept, 2)[:, 9:])


def test_lookup_leaves_the_session_where_its_tokens_end(remote):
    lookup = {"max_new_tokens": 8, "prompt_lookup_num_tokens": 4}
    with remote.inference_session(max_length=60) as session:
        first = remote.generate(PROMPT, **lookup)
        assert session.position <= first.shape[1] - 1
        (rows,) = remote.remote_blocks.runner.sessions
        num_before = len(rows.steps)
        remote.generate(None, **lookup)
    starts, counts, _ = rows.steps[num_before]
    assert starts[0] + counts[0] <= first.shape[1] + 4


def test_after_steps_of_ones_own(local, remote):
    expected = greedy(local, joined(PROMPT, REPLY), 4)[:, PROMPT.shape[1] :]
    with torch.no_grad(), remote.inference_session(max_length=40):
        remote(PROMPT)
        assert torch.equal(remote.generate(REPLY, max_new_tokens=4), expected)
    with torch.no_grad(), remote.inference_session(max_length=40) as session:
        embedded = remote.transformer.word_embeddings(PROMPT)
        session.step(remote.transformer.word_embeddings_layernorm(embedded))
        assert torch.equal(remote.generate(REPLY, max_new_tokens=4), expected)


def test_a_padded_batch_is_continued(local, remote):
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with remote.inference_session(max_length=40):
        first = remote.generate(ids, attention_mask=mask, max_new_tokens=3)
        # the second turn's rows differ in length too, padded on the right this time
        turn, turn_mask = torch.tensor([[4, 3, 0], [4, 3, 2]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
        rest = remote.generate(turn, attention_mask=turn_mask, max_new_tokens=3)
    assert torch.equal(rest[:, :3], turn)
    for row, (skip, num_new) in enumerate([(2, 2), (0, 3)]):
        text = torch.cat([first[row, skip:], turn[row, :num_new]])[None]
        assert torch.equal(greedy(local, text, 3)[0, -3:], rest[row, -3:])


def test_an_error_leaves_the_session_usable(local, remote):
    with remote.inference_session(max_length=40):
        first = remote.generate(PROMPT, max_new_tokens=3)
        for wrong, message in (
            (torch.tensor([[1000]]), "vocabulary"),
            (REPLY.repeat(2, 1), "rows"),
        ):
            with pytest.raises(BadInput, match=message):
                remote.generate(wrong, max_new_tokens=3)
        rest = remote.generate(None, max_new_tokens=3)
    assert torch.equal(joined(first, rest), greedy(local, PROMPT, 6))


def test_what_a_session_cannot_continue(remote):
    with torch.no_grad(), remote.inference_session(max_length=40):
        with pytest.raises(NotSupported, match="embeddings"):
            remote.generate(inputs_embeds=torch.zeros(1, 2, 32), max_new_tokens=2)
        remote(PROMPT)
        with pytest.raises(BadInput, match="ids of its tokens are unknown"):
            remote.generate(None, max_new_tokens=2)


class Broken(Exception):
    pass


class Raising:
    """Something of the caller's that raises at its ``count``-th call."""

    def __init__(self, error, count):
        self.error, self.count = error, count

    def step(self):
        self.count -= 1
        if self.count == 0:
            raise self.error


class RaisingProcessor(Raising, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.step()
        return scores


class RaisingCriterion(Raising, StoppingCriteria):
    def __call__(self, input_ids, scores):
        self.step()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class RaisingStreamer(Raising, BaseStreamer):
    num_ends = 0

    def put(self, value):
        self.step()

    def end(self):
        self.num_ends += 1
        raise Broken


def interruptions(remote, count):
    """Each way to interrupt `generate` after ``count`` tokens: the error, options of the call."""
    lost = MissingBlocksError("Blocks 2:4 are not served.")
    for error in (lost, LengthExceeded("Too long.")):

        def in_a_step(error=error):
            sessions = remote.remote_blocks.runner.sessions
            num_steps = len(sessions[-1].steps) if sessions else 0
            remote.remote_blocks.runner.errors[num_steps + count] = error
            return {}

        yield error, in_a_step
    for error in (Broken(), KeyboardInterrupt(), SystemExit()):
        for name, kind in (
            ("logits_processor", RaisingProcessor),
            ("stopping_criteria", RaisingCriterion),
            ("streamer", RaisingStreamer),
        ):
            raising = kind(error, count)
            value = raising if name == "streamer" else [raising]
            yield error, lambda name=name, value=value: {name: value}


MODES = {
    "greedy": {},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("num_turns", [0, 1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_call_leaves_the_session_where_it_stood(local, remote, mode, num_turns):
    options = MODES[mode]
    for error, interrupt in interruptions(remote, 3):
        remote.remote_blocks.runner.sessions.clear()
        remote.remote_blocks.runner.errors.clear()
        with remote.inference_session(max_length=60) as session:
            text = torch.zeros(1, 0, dtype=torch.int64)
            for _ in range(num_turns):
                text = joined(text, remote.generate(PROMPT, max_new_tokens=4))
            before = session.output_ids, session.position
            interrupting = interrupt()
            streamer = interrupting.get("streamer")
            if streamer is not None and mode in ("samples", "beams"):
                continue  # transformers streams one sequence
            with pytest.raises(type(error)) as caught:
                remote.generate(REPLY, max_new_tokens=9, **options, **interrupting)
            assert caught.value is error
            assert streamer is None or streamer.num_ends == 1
            assert session.output_ids is before[0]
            assert session.position == before[1]
            generated = error.generated
            assert torch.equal(generated[:, :3], REPLY.expand(len(generated), -1))
            assert mode == "lookup" or 3 + 1 <= generated.shape[1] <= 3 + 3
            assert len(generated) == options.get("num_return_sequences", 1)
            if mode in ("greedy", "lookup"):
                whole = greedy(local, joined(text, REPLY), 9)[:, text.shape[1] :]
                assert torch.equal(generated, whole[:, : generated.shape[1]])
            torch.manual_seed(1)
            again = remote.generate(REPLY, max_new_tokens=5, **options)
            torch.manual_seed(1)
            whole = local.generate(joined(text, REPLY), max_new_tokens=5, use_cache=True, **options)
            assert torch.equal(again, whole[:, text.shape[1] :]), (mode, error)


def test_ctrl_c_in_a_step(local, remote):
    async def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        await asyncio.Event().wait()  # until the step is cancelled

    with remote.inference_session(max_length=40) as session:
        first = remote.generate(PROMPT, max_new_tokens=3)
        remote.remote_blocks.runner.errors[5] = interrupt
        with pytest.raises(KeyboardInterrupt) as caught:
            remote.generate(REPLY, max_new_tokens=8)
        assert torch.equal(session.output_ids, first)
        answer = remote.generate(REPLY, max_new_tokens=8)
    assert torch.equal(joined(first, answer), greedy(local, joined(first, REPLY), 8))
    assert torch.equal(caught.value.generated, answer[:, :5])


def test_what_was_generated_can_be_continued(local, remote):
    with remote.inference_session(max_length=40):
        first = remote.generate(PROMPT, max_new_tokens=3)
        remote.remote_blocks.runner.errors[6] = MissingBlocksError("Blocks 2:4 are not served.")
        with pytest.raises(MissingBlocksError) as caught:
            remote.generate(REPLY, max_new_tokens=8)
        assert caught.value.generated.shape[1] == REPLY.shape[1] + 3
        whole = remote.generate(caught.value.generated, max_new_tokens=5)
    assert torch.equal(joined(first, whole), greedy(local, joined(first, REPLY), 8))


def test_a_session_that_was_too_short_goes_on_with_less(local, remote):
    with remote.inference_session(max_length=24):
        first = remote.generate(PROMPT, max_new_tokens=10)
        with pytest.raises(LengthExceeded) as caught:
            remote.generate(REPLY, max_new_tokens=10)
        rest = remote.generate(REPLY, max_new_tokens=3)
    whole = greedy(local, joined(first, REPLY), 5)[:, first.shape[1] :]
    assert torch.equal(rest, whole[:, :-2])
    assert torch.equal(caught.value.generated, whole)  # all for which the session has room


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"negative_prompt_ids": torch.tensor([[5, 6]])},
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["plain", "negative prompt", "beams", "samples"],
)
def test_guidance_in_a_session(local, remote, options):
    options = {"guidance_scale": 1.5, "max_new_tokens": 6} | options
    with remote.inference_session(max_length=40):
        text = torch.zeros(1, 0, dtype=torch.int64)
        for turn in (PROMPT, REPLY):
            torch.manual_seed(2)
            answer = remote.generate(turn, **options)
            torch.manual_seed(2)
            whole = local.generate(joined(text, turn), use_cache=True, **options)
            assert torch.equal(answer, whole[:, text.shape[1] :])
            if len(answer) > 1:
                break  # the next turn needs as many prompts
            text = joined(text, answer)


def test_a_processor_may_run_the_model(local, remote):
    class Ensemble(LogitsProcessor):
        def __init__(self, model):
            self.model = model

        def __call__(self, input_ids, scores):
            alone = self.model(input_ids[:, -2:]).logits[:, -1]
            return scores + alone + self.model.generate(input_ids[:, -1:], max_new_tokens=1)[0, 1]

    with remote.inference_session(max_length=40):
        first = remote.generate(PROMPT, max_new_tokens=4, logits_processor=[Ensemble(remote)])
        rest = remote.generate(None, max_new_tokens=3, logits_processor=[Ensemble(remote)])
    expected = local.generate(
        PROMPT, max_new_tokens=7, logits_processor=[Ensemble(local)], use_cache=True
    )
    assert torch.equal(joined(first, rest), expected)


class TestWholeTexts:
    """`generate(full_text)`, as people call it who do not know that the session has the text."""

    def test_only_what_follows_is_run(self, local, remote, caplog):
        caplog.set_level("INFO", "petals")
        with remote.inference_session(max_length=40) as session:
            text = remote.generate(PROMPT, max_new_tokens=4)
            assert not caplog.records
            text = remote.generate(joined(text, REPLY), max_new_tokens=4)
            assert torch.equal(text, greedy(local, joined(text[:, :11], REPLY), 4))
            (record,) = caplog.records
            assert "begins with the 11 tokens of the session" in record.getMessage()
            assert torch.equal(session.output_ids, text)
            assert session.position == text.shape[1] - 1
            again = remote.generate(text, max_new_tokens=2)
            assert torch.equal(again, greedy(local, text, 2))

    def test_in_a_padded_batch(self, local, remote):
        ids = torch.tensor([[5, 6, 7, 0, 0], [9, 8, 7, 6, 5]])
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        with remote.inference_session(max_length=40):
            text = remote.generate(ids, attention_mask=mask, max_new_tokens=3)
            mask = joined(mask, torch.ones(2, 6, dtype=torch.int64))
            given = joined(text, REPLY.expand(2, -1))
            whole = remote.generate(given, attention_mask=mask, max_new_tokens=3)
        assert torch.equal(whole[:, : given.shape[1]], given)
        for row, real in enumerate(mask[:, : given.shape[1]].bool()):
            expected = greedy(local, given[row, real][None], 3)
            assert torch.equal(whole[row, -3:], expected[0, -3:])

    def test_another_text_follows_the_session(self, local, remote):
        with remote.inference_session(max_length=40):
            first = remote.generate(PROMPT, max_new_tokens=3)
            other = joined(first[:, 1:], REPLY)
            rest = remote.generate(other, max_new_tokens=3)
        assert torch.equal(joined(first, rest), greedy(local, joined(first, other), 3))


def test_tokens_that_generate_has_not_seen_are_told(local, remote):
    with torch.no_grad(), remote.inference_session(max_length=40) as session:
        first = remote.generate(PROMPT, max_new_tokens=3)
        remote(REPLY)
        with pytest.raises(BadInput, match="without generate") as refused:
            remote.generate(REPLY, max_new_tokens=3)
        assert f"session.position = {first.shape[1]}" in refused.value.hint
        session.position = first.shape[1] - 1
        session.output_ids = first
        rest = remote.generate(REPLY, max_new_tokens=3)
    assert torch.equal(joined(first, rest), greedy(local, joined(first, REPLY), 3))

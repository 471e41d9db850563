"""Continuing a session: in turns, without input, rolled back, after beams, after plain steps."""

import pytest
import torch

from petals.errors import BadInput, MissingBlocksError, NotSupported
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
        with pytest.raises(BadInput, match="last token"):
            remote.generate(None, max_new_tokens=2)


def test_generated_tokens_survive_the_loss_of_blocks(local, remote):
    whole = greedy(local, PROMPT, 8)
    with remote.inference_session(max_length=40) as session:
        remote.remote_blocks.runner.errors[4] = MissingBlocksError("Blocks 2:4 are not served.")
        with pytest.raises(MissingBlocksError) as caught:
            remote.generate(PROMPT, max_new_tokens=8)
        assert torch.equal(caught.value.generated, whole[:, : PROMPT.shape[1] + 4])
        rest = remote.generate(None, max_new_tokens=4)
        assert torch.equal(session.output_ids, whole)
        assert torch.equal(rest, whole[:, -4:])


def test_beams_begin_again_after_the_loss_of_blocks(local, remote):
    beams = {"max_new_tokens": 6, "num_beams": 2}
    with remote.inference_session(max_length=40):
        remote.remote_blocks.runner.errors[3] = MissingBlocksError("Blocks 2:4 are not served.")
        with pytest.raises(MissingBlocksError) as caught:
            remote.generate(PROMPT, **beams)
        assert caught.value.generated is None
        again = remote.generate(PROMPT, **beams)
    assert torch.equal(again, local.generate(PROMPT, use_cache=True, **beams))

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


def steps_of(remote):
    (session,) = remote.remote_blocks.runner.sessions
    return session.steps


def greedy(model, ids, num_tokens, **options):
    return model.generate(ids, max_new_tokens=num_tokens, use_cache=True, **options)


def test_turns_are_one_long_conversation(local, remote):
    with remote.inference_session(max_length=40) as session:
        first = remote.generate(PROMPT, max_new_tokens=4)
        second = remote.generate(REPLY, max_new_tokens=4)
        third = remote.generate(None, max_new_tokens=3)
    assert torch.equal(first, greedy(local, PROMPT, 4))
    whole = greedy(local, torch.cat([first, REPLY], dim=1), 7)
    assert torch.equal(second, whole[:, first.shape[1] : -3])  # the reply and its continuation
    assert torch.equal(third, whole[:, -3:])  # only what is new
    assert torch.equal(session.output_ids, whole)
    assert session.position == whole.shape[1] - 1
    assert len(remote.remote_blocks.runner.sessions) == 1


def test_no_token_runs_twice(remote):
    with remote.inference_session(max_length=40) as session:
        remote.generate(PROMPT, max_new_tokens=4)
        remote.generate(REPLY, max_new_tokens=4)
    assert sum(counts[0] for _, counts, _ in steps_of(remote)) == session.position


def test_session_as_an_argument(local, remote):
    with remote.remote_blocks.inference_session(max_length=40) as session:
        pass_on = {"session": session}
        first = remote.generate(PROMPT, max_new_tokens=4, **pass_on)
        assert remote.active_session is session
        rest = remote.generate(max_new_tokens=4, **pass_on)
    assert remote.active_session is None
    assert torch.equal(torch.cat([first, rest], dim=1), greedy(local, PROMPT, 8))


def test_use_session_from_outside(local, remote):
    session = remote.remote_blocks.open_session(max_length=20)
    with remote.use_session(session):
        first = remote.generate(PROMPT, max_new_tokens=2)
    assert remote.active_session is None
    with remote.use_session(session):
        rest = remote.generate(None, max_new_tokens=2)
    assert torch.equal(torch.cat([first, rest], dim=1), greedy(local, PROMPT, 4))
    with remote.use_session(None) as nothing:
        assert nothing is None


def test_penalties_see_the_whole_history(local, remote):
    penalty = {"repetition_penalty": 3.0}
    with remote.inference_session(max_length=40):
        first = remote.generate(PROMPT, max_new_tokens=3, **penalty)
        rest = remote.generate(None, max_new_tokens=5, **penalty)
    assert torch.equal(torch.cat([first, rest], dim=1), greedy(local, PROMPT, 8, **penalty))


def test_max_length_counts_the_whole_session(remote):
    with remote.inference_session(max_length=40) as session:
        remote.generate(PROMPT, max_new_tokens=3)
        assert remote.generate(None, max_length=12).shape == (1, 2)
        assert session.output_ids.shape == (1, 12)


def test_a_position_set_back_is_where_it_goes_on(local, remote):
    with remote.inference_session(max_length=40) as session:
        first = remote.generate(PROMPT, max_new_tokens=6)
        session.position = 9
        again = remote.generate(REPLY, max_new_tokens=3)
        session.position = 9
        same = remote.generate(None, max_new_tokens=2)
    kept = first[:, :9]
    expected = greedy(local, torch.cat([kept, REPLY], dim=1), 3)
    assert torch.equal(again, expected[:, 9:])
    assert torch.equal(same, greedy(local, kept, 2)[:, 9:])


def test_lookup_leaves_the_session_where_its_tokens_end(local, remote):
    with remote.inference_session(max_length=60) as session:
        first = remote.generate(PROMPT, max_new_tokens=8, prompt_lookup_num_tokens=4)
        assert session.position <= first.shape[1] - 1
        num_before = len(steps_of(remote))
        rest = remote.generate(None, max_new_tokens=8, prompt_lookup_num_tokens=4)
        starts, counts, _ = steps_of(remote)[num_before]
        assert starts[0] + counts[0] <= first.shape[1] + 4
    assert torch.equal(torch.cat([first, rest], dim=1), greedy(local, PROMPT, 16))


@pytest.mark.parametrize("num_answers", [1, 2])
def test_after_beams(local, remote, num_answers):
    beams = {"num_beams": 3, "num_return_sequences": num_answers}
    with remote.inference_session(max_length=40):
        first = remote.generate(PROMPT, max_new_tokens=4, **beams)
        rest = remote.generate(None, max_new_tokens=4)
    assert torch.equal(first, greedy(local, PROMPT, 4, **beams))
    assert torch.equal(torch.cat([first, rest], dim=1), greedy(local, first, 4))


def test_beams_in_rows_that_were_reserved(local, remote):
    with remote.inference_session(max_length=40, num_rows=3) as session:
        assert (session.num_rows, session.lengths) == (3, ())
        first = remote.generate(PROMPT, max_new_tokens=4, num_beams=3)
        rest = remote.generate(None, max_new_tokens=4)
    assert torch.equal(first, greedy(local, PROMPT, 4, num_beams=3))
    assert torch.equal(torch.cat([first, rest], dim=1), greedy(local, first, 4))


def test_beams_in_a_later_turn(local, remote):
    with remote.inference_session(max_length=40):
        first = remote.generate(PROMPT, max_new_tokens=4)
        rest = remote.generate(None, max_new_tokens=4, num_beams=3)
    expected = greedy(local, first, 4, num_beams=3)
    assert torch.equal(torch.cat([first, rest], dim=1), expected)


def test_several_samples_go_on_apart(local, remote):
    torch.manual_seed(3)
    with remote.inference_session(max_length=40):
        first = remote.generate(PROMPT, max_new_tokens=3, do_sample=True, num_return_sequences=3)
        rest = remote.generate(None, max_new_tokens=3)
    assert torch.equal(torch.cat([first, rest], dim=1), greedy(local, first, 3))


def test_after_steps_of_ones_own(local, remote):
    expected = greedy(local, torch.cat([PROMPT, REPLY], dim=1), 4)
    with torch.no_grad(), remote.inference_session(max_length=40):
        remote(PROMPT)
        by_model = remote.generate(REPLY, max_new_tokens=4)
    assert torch.equal(by_model, expected[:, PROMPT.shape[1] :])
    with torch.no_grad(), remote.inference_session(max_length=40) as session:
        embedded = remote.transformer.word_embeddings(PROMPT)
        session.step(remote.transformer.word_embeddings_layernorm(embedded))
        by_step = remote.generate(REPLY, max_new_tokens=4)
    assert torch.equal(by_step, by_model)


def test_a_padded_batch_goes_on(local, remote):
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with remote.inference_session(max_length=40):
        first = remote.generate(ids, attention_mask=mask, max_new_tokens=3)
        # the second turn's rows differ in length too, padded on the right this time
        turn, turn_mask = torch.tensor([[4, 3, 0], [4, 3, 2]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
        rest = remote.generate(turn, attention_mask=turn_mask, max_new_tokens=3)
    assert torch.equal(rest[:, :3], turn)
    for row, (skip, num_new) in enumerate([(2, 2), (0, 3)]):
        told = torch.cat([first[row, skip:], turn[row, :num_new]])[None]
        assert torch.equal(greedy(local, told, 3)[0, -3:], rest[row, -3:])


def test_an_error_leaves_the_session_usable(local, remote):
    with remote.inference_session(max_length=40):
        first = remote.generate(PROMPT, max_new_tokens=3)
        with pytest.raises(BadInput, match="vocabulary"):
            remote.generate(torch.tensor([[1000]]), max_new_tokens=3)
        with pytest.raises(BadInput, match="rows"):
            remote.generate(REPLY.repeat(2, 1), max_new_tokens=3)
        rest = remote.generate(None, max_new_tokens=3)
    assert torch.equal(torch.cat([first, rest], dim=1), greedy(local, PROMPT, 6))


def test_what_a_session_cannot_continue(local, remote):
    with torch.no_grad(), remote.inference_session(max_length=40):
        with pytest.raises(NotSupported, match="embeddings"):
            remote.generate(inputs_embeds=torch.zeros(1, 2, 32), max_new_tokens=2)
        remote(PROMPT)
        with pytest.raises(BadInput, match="last token"):
            remote.generate(None, max_new_tokens=2)


def test_what_was_generated_survives_the_loss_of_blocks(local, remote):
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
    with remote.inference_session(max_length=40):
        remote.remote_blocks.runner.errors[3] = MissingBlocksError("Blocks 2:4 are not served.")
        with pytest.raises(MissingBlocksError) as caught:
            remote.generate(PROMPT, max_new_tokens=6, num_beams=2)
        assert caught.value.generated is None
        again = remote.generate(PROMPT, max_new_tokens=6, num_beams=2)
    assert torch.equal(again, greedy(local, PROMPT, 6, num_beams=2))

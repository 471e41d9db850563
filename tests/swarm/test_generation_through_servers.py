"""Stock `generate` on a model whose blocks real servers run, over a network in memory."""

import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Thread

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteria, TextIteratorStreamer

from petals.client.connection.event_loop import client_loop
from petals.types import BlockSpan
from support.models import WriteModel
from support.reference import assert_close
from support.swarm import RealSwarm, real_swarm

PROMPT = torch.tensor([[11, 54, 7, 11, 54, 23, 90]])
FAMILIES = ("llama", "bloom", "mixtral", "gemma3_text")


@dataclass
class Pair:
    swarm: RealSwarm
    remote: PreTrainedModel

    @property
    def local(self) -> PreTrainedModel:
        return self.swarm.local


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tiny_folder: WriteModel) -> Iterator[Pair]:
    folder = tiny_folder(request.param)
    with real_swarm(folder, BlockSpan(0, 2), BlockSpan(2, 5), cache_tokens=1024) as swarm:
        yield Pair(swarm, swarm.model())


def test_every_mode_gives_the_local_tokens(pair: Pair) -> None:
    modes = (
        {},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 4},
        {"assistant_model": pair.local},
    )
    for mode in modes:
        options = {"max_new_tokens": 8, "use_cache": True} | mode
        torch.manual_seed(0)
        expected = pair.local.generate(PROMPT, **options)
        torch.manual_seed(0)
        assert torch.equal(pair.remote.generate(PROMPT, **options), expected), mode


def test_padded_batches(pair: Pair) -> None:
    ids = torch.tensor([[0, 0, 0, 5, 6], [0, 5, 6, 7, 8], [9, 8, 7, 6, 5]])
    mask = (ids != 0).long()
    options = {"attention_mask": mask, "max_new_tokens": 6, "use_cache": True}
    for more in ({}, {"num_beams": 2}):
        expected = pair.local.generate(ids, **options, **more)
        assert torch.equal(pair.remote.generate(ids, **options, **more), expected)
    expected = pair.local(ids, attention_mask=mask).logits
    actual = pair.remote(ids, attention_mask=mask).logits
    assert_close(actual[mask.bool()], expected[mask.bool()])


def test_a_conversation(pair: Pair) -> None:
    with pair.remote.inference_session(max_length=40) as session:
        told = pair.remote.generate(PROMPT, max_new_tokens=4)
        reply = torch.tensor([[8, 41]])
        answer = pair.remote.generate(reply, max_new_tokens=4)
        assert session.position == told.shape[1] + answer.shape[1] - 1
        session.position = told.shape[1]
        again = pair.remote.generate(None, max_new_tokens=3)
    whole = pair.local.generate(torch.cat([told, reply], dim=1), max_new_tokens=4, use_cache=True)
    assert torch.equal(torch.cat([told, answer], dim=1), whole)
    assert torch.equal(torch.cat([told, again], dim=1), pair.local.generate(told, max_new_tokens=3))


class CtrlC(StoppingCriteria):
    """Interrupts the main thread while the step after the third token is under way."""

    num_tokens = 0

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.num_tokens += 1
        if self.num_tokens == 3:
            client_loop.loop.call_soon_threadsafe(
                signal.pthread_kill, threading.main_thread().ident, signal.SIGINT
            )
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_ctrl_c_in_a_conversation(pair: Pair) -> None:
    reply = torch.tensor([[8, 41]])
    with pair.remote.inference_session(max_length=64) as session:
        text = pair.remote.generate(PROMPT, max_new_tokens=4)
        for mode in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
            position = session.position
            with pytest.raises(KeyboardInterrupt) as stopped:
                # More than three steps, although a step that verifies a draft gives up to 4 tokens.
                pair.remote.generate(reply, max_new_tokens=24, stopping_criteria=[CtrlC()], **mode)
            assert session.position == position
            answer = pair.remote.generate(reply, max_new_tokens=4)
            whole = torch.cat([text, reply], dim=1)
            expected = pair.local.generate(whole, max_new_tokens=4, use_cache=True)
            text = torch.cat([text, answer], dim=1)
            assert torch.equal(text, expected)
            if not mode:
                generated = stopped.value.generated
                num_common = min(generated.shape[1], answer.shape[1])
                assert num_common >= reply.shape[1] + 3
                assert torch.equal(generated[:, :num_common], answer[:, :num_common])


def test_guidance_in_a_conversation(pair: Pair) -> None:
    options = {"guidance_scale": 1.5, "max_new_tokens": 5}
    reply = torch.tensor([[8, 41]])
    with pair.remote.inference_session(max_length=40):
        told = pair.remote.generate(PROMPT, **options)
        answer = pair.remote.generate(reply, **options)
    whole = pair.local.generate(PROMPT, use_cache=True, **options)
    assert torch.equal(told, whole)
    whole = pair.local.generate(torch.cat([told, reply], dim=1), use_cache=True, **options)
    assert torch.equal(torch.cat([told, answer], dim=1), whole)


def test_a_stream_from_another_thread(pair: Pair) -> None:
    class Words:
        def decode(self, ids: list[int], **kwargs: object) -> str:
            return "".join(f"{int(token)} " for token in ids)

    with pair.remote.inference_session(max_length=40):
        text = pair.remote.generate(PROMPT, max_new_tokens=4)
        streamer = TextIteratorStreamer(Words(), timeout=60, skip_prompt=True)
        call = {"input_ids": torch.tensor([[8, 41]]), "max_new_tokens": 4, "streamer": streamer}
        Thread(target=pair.remote.generate, kwargs=call).start()
        words = "".join(streamer).split()
        rest = pair.remote.generate(None, max_new_tokens=2)  # waits for the thread's call
    expected = pair.local.generate(
        torch.cat([text, call["input_ids"]], dim=1), max_new_tokens=6, use_cache=True
    )[0, text.shape[1] + 2 :].tolist()
    assert [int(word) for word in words] + rest[0].tolist() == expected


def test_a_cache_that_grows(pair: Pair) -> None:
    with torch.no_grad():
        expected = pair.local(PROMPT).logits
        first = pair.remote(PROMPT[:, :4], use_cache=True)
        with first.past_key_values as cache:
            rest = pair.remote(PROMPT[:, 4:], past_key_values=cache)
    assert_close(torch.cat([first.logits, rest.logits], dim=1), expected)

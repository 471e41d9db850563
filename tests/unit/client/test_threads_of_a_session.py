"""A call from another thread continues the session of its `with` block, or is refused."""

import asyncio
import contextvars
import functools
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier, Event, Thread

import pytest
import torch
from transformers import LogitsProcessor, TextIteratorStreamer

from petals.errors import BadInput, MissingBlocksError, NotSupported, SessionClosed
from support.local_blocks import tiny_pair

PROMPT = torch.tensor([[11, 54, 7, 33, 54, 23, 90]])
REPLY = torch.tensor([[8, 41, 77]])


@pytest.fixture(scope="module")
def pair():
    return tiny_pair("llama")


@pytest.fixture
def local(pair):
    return pair[0]


@pytest.fixture
def remote(pair):
    pair[1].remote_blocks.runner.sessions.clear()
    pair[1].remote_blocks.runner.errors.clear()
    return pair[1]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as executor:
        yield executor


def whole(local, num_turns, num_tokens=4):
    """The text of turns that begin with PROMPT and go on with REPLY."""
    text = PROMPT
    for turn in range(num_turns):
        text = text if turn == 0 else torch.cat([text, REPLY], dim=1)
        text = local.generate(text, max_new_tokens=num_tokens, use_cache=True)
    return text


def in_a_thread(call, *args, **kwargs):
    found = []
    thread = Thread(target=lambda: found.append(call(*args, **kwargs)))
    thread.start()
    thread.join()
    return found[0]


def with_asyncio(generate, *args, **kwargs):
    async def run():
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, functools.partial(generate, *args, **kwargs))

    return asyncio.run(run())


RECIPES = {
    "Thread(target=model.generate)": lambda model, pool: functools.partial(
        in_a_thread, model.generate
    ),
    "executor.submit(model.generate)": lambda model, pool: (
        lambda *args, **kwargs: pool.submit(model.generate, *args, **kwargs).result()
    ),
    "run_in_executor(None, model.generate)": lambda model, pool: functools.partial(
        with_asyncio, model.generate
    ),
    "asyncio.to_thread(model.generate)": lambda model, pool: (
        lambda *args, **kwargs: asyncio.run(asyncio.to_thread(model.generate, *args, **kwargs))
    ),
    "session=session": lambda model, pool: functools.partial(
        in_a_thread,
        lambda session, *args, **kwargs: model.generate(*args, session=session, **kwargs),
        model.active_session,
    ),
    "use_session": lambda model, pool: functools.partial(
        in_a_thread, functools.partial(within, model, model.active_session)
    ),
    "copy_context": lambda model, pool: functools.partial(
        in_a_thread, contextvars.copy_context().run, lambda *args, **kw: model.generate(*args, **kw)
    ),
}


def within(model, session, *args, **kwargs):
    with model.use_session(session):
        return model.generate(*args, **kwargs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_continues_the_session(local, remote, pool, recipe):
    with remote.inference_session(max_length=40) as session:
        generate = RECIPES[recipe](remote, pool)
        first = generate(PROMPT, max_new_tokens=4)
        second = generate(REPLY, max_new_tokens=4)
        third = remote.generate(None, max_new_tokens=2)
    assert torch.equal(torch.cat([first, second], dim=1), whole(local, 2))
    assert torch.equal(session.output_ids, torch.cat([first, second, third], dim=1))
    assert len(remote.remote_blocks.runner.sessions) == 1


UNKNOWN = {
    "generate": lambda model: model.generate(PROMPT, max_new_tokens=2),
    "generate with an option of its own": lambda model: model.generate(
        PROMPT, max_new_tokens=2, num_beams=2
    ),
    "the model": lambda model: model(PROMPT),
    "the model with a cache": lambda model: model(PROMPT, use_cache=True),
    "the base model": lambda model: model.model(PROMPT),
    "the blocks": lambda model: model.remote_blocks(torch.zeros(1, 2, 32)),
}


@pytest.mark.parametrize("call", UNKNOWN)
def test_a_call_that_may_belong_to_a_session_is_refused(remote, pool, call):
    with remote.inference_session(max_length=40) as session:
        with pytest.raises(NotSupported, match="another thread") as refused:
            pool.submit(UNKNOWN[call], remote).result()
        assert "session=session" in refused.value.hint
        assert session.position == 0
    assert not remote.remote_blocks.runner.sessions
    pool.submit(UNKNOWN[call], remote).result()  # no session is open any more


def test_a_call_apart_from_all_sessions(local, remote, pool):
    def alone():
        with remote.use_session(None):
            return remote.generate(PROMPT, max_new_tokens=4)

    with remote.inference_session(max_length=40):
        remote.generate(REPLY, max_new_tokens=4)
        assert torch.equal(pool.submit(alone).result(), whole(local, 1))
        assert torch.equal(alone(), whole(local, 1))
        cache = remote.new_cache()
        given = {"past_key_values": cache, "max_new_tokens": 4}
        assert torch.equal(pool.submit(remote.generate, PROMPT, **given).result(), whole(local, 1))


def test_threads_with_sessions_of_their_own(local, remote, pool):
    both = Barrier(4)

    def converse():
        with remote.inference_session(max_length=40) as session:
            both.wait(10)  # all are open at once
            first = remote.generate(PROMPT, max_new_tokens=4)
            both.wait(10)
            with remote.inference_session(max_length=40):
                inner = remote.generate(PROMPT, max_new_tokens=4)
            second = remote.generate(REPLY, max_new_tokens=4)
            assert torch.equal(session.output_ids, torch.cat([first, second], dim=1))
            return inner, session.output_ids

    for future in [pool.submit(converse) for _ in range(4)]:
        inner, text = future.result()
        assert torch.equal(text, whole(local, 2))
        assert torch.equal(inner, whole(local, 1))


def test_calls_for_one_session_run_one_after_the_other(local, remote, pool):
    started, go_on = Event(), Event()

    class Waits(LogitsProcessor):
        def __call__(self, input_ids, scores):
            started.set()
            assert go_on.wait(10)
            return scores

    with remote.inference_session(max_length=40):
        slow = pool.submit(remote.generate, PROMPT, max_new_tokens=4, logits_processor=[Waits()])
        assert started.wait(10)
        fast = pool.submit(remote.generate, REPLY, max_new_tokens=4)
        go_on.set()
        text = torch.cat([slow.result(), fast.result()], dim=1)
    assert torch.equal(text, whole(local, 2))


def test_a_thread_that_outlives_the_block(remote, pool):
    with remote.inference_session(max_length=40):
        generate = remote.generate
    with pytest.raises(SessionClosed):
        pool.submit(generate, PROMPT, max_new_tokens=2).result()


class TestStreaming:
    """`for text in streamer` ends whatever happens to the thread that generates."""

    class Words:
        def decode(self, ids, **kwargs):
            return "".join(f"{int(token)} " for token in ids)

    def stream(self, remote, pool, ids, **options):
        streamer = TextIteratorStreamer(self.Words(), timeout=10, skip_prompt=True)
        future = pool.submit(remote.generate, ids, streamer=streamer, **options)
        return "".join(streamer), future

    def test_turns(self, local, remote, pool):
        text = whole(local, 2)
        with remote.inference_session(max_length=40):
            first, _ = self.stream(remote, pool, PROMPT, max_new_tokens=4)
            second, _ = self.stream(remote, pool, REPLY, max_new_tokens=4)
        assert first.split() == [str(token) for token in text[0, 7:11].tolist()]
        assert second.split() == [str(token) for token in text[0, 14:].tolist()]

    @pytest.mark.parametrize("in_session", [False, True])
    def test_every_error_ends_it(self, remote, pool, in_session):
        for ids, options, error in (
            (PROMPT, {}, MissingBlocksError),
            (torch.tensor([[1000]]), {}, BadInput),
            (PROMPT, {"dola_layers": "low"}, NotSupported),
            (PROMPT, {"no_such_option": 1}, ValueError),
            (PROMPT, {"num_beams": 2}, ValueError),
        ):
            remote.remote_blocks.runner.errors = {2: MissingBlocksError("Blocks are lost.")}
            around = remote.inference_session(max_length=40) if in_session else nullcontext()
            with around:
                text, future = self.stream(remote, pool, ids, max_new_tokens=5, **options)
                with pytest.raises(error):
                    future.result()
            assert len(text.split()) == (2 if error is MissingBlocksError else 0)

    def test_a_streamer_among_the_positional_arguments(self, remote, pool):
        streamer = TextIteratorStreamer(self.Words(), timeout=10)
        nothing = (None,) * 6
        future = pool.submit(remote.generate, PROMPT[:, :0], *nothing, streamer)
        assert "".join(streamer) == ""
        with pytest.raises(BadInput):
            future.result()

"""Programs that end, fork or start workers while they use a swarm.

``python -m support.process_shapes SHAPE MODEL PEER...`` runs one and prints the tokens that each
process generated, one line of JSON per process and call. Importable, so that `multiprocessing` can
spawn workers.
"""

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from petals import AutoDistributedModelForCausalLM
from petals.errors import PetalsError

PROMPT = (5, 6, 7, 8)
NUM_NEW = 6
CHILD_SECONDS = 60.0
"""Time limit for a child process of a shape; the whole program then fails."""

Words = list[str]
"""The model's path and the addresses of its swarm."""


def load(words: Words) -> Any:
    path, *peers = words
    return AutoDistributedModelForCausalLM.from_pretrained(
        path, initial_peers=peers, dtype=torch.float32, show_route=False
    )


def generate(model: Any, **options: Any) -> None:
    """Print the name of this process's role and its tokens."""
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_NEW, do_sample=False, **options)
    say("tokens", ids[0].tolist())


def say(kind: str, value: object) -> None:
    """One line in one write, so that lines of several processes do not mix."""
    os.write(1, (json.dumps([kind, value, time.time()]) + "\n").encode())


def refused(model: Any, **options: Any) -> None:
    """Print the error that a call of ``generate`` ends with."""
    try:
        generate(model, **options)
    except PetalsError as error:
        say("refused", [type(error).__name__, str(error)])


# -- Ends of the interpreter with an open session ----------------------------------------------


def _opened(words: Words) -> tuple[Any, Any]:
    model = load(words)
    context = model.inference_session(max_length=64)
    session = context.__enter__()
    generate(model)
    return model, (context, session)


def end_of_script(words: Words) -> object:
    return _opened(words)


def system_exit(words: Words) -> object:
    KEPT.append(_opened(words))
    raise SystemExit(3)


def exception(words: Words) -> object:
    KEPT.append(_opened(words))
    raise ValueError("an error of the script")


def _stream(model: Any) -> Iterator[None]:
    with model.inference_session(max_length=64):
        while True:
            generate(model)
            yield


def suspended_generator(words: Words) -> object:
    stream = _stream(load(words))
    next(stream)
    return stream


class _Cycle:
    def __init__(self, stream: Iterator[None]) -> None:
        self.me, self.stream = self, stream


def generator_in_a_cycle(words: Words) -> object:
    stream = _stream(load(words))
    next(stream)
    gc.disable()  # the cycle is found by the collection at the end of the interpreter
    return _Cycle(stream)


def generator_beside_a_thread(words: Words) -> object:
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    return suspended_generator(words)


def daemon_thread_in_generate(words: Words) -> object:
    """The thread generates for ever; the script ends in the middle of a call."""
    model = load(words)
    first = threading.Event()

    def work() -> None:
        with model.inference_session(max_length=256) as session:
            while True:
                session.position = 0
                session.output_ids = None
                model.generate(torch.tensor([PROMPT]), max_new_tokens=200, do_sample=False)
                first.set()

    threading.Thread(target=work, daemon=True).start()
    assert first.wait(CHILD_SECONDS)
    generate(load(words))  # the other model's calls belong to the thread's session
    return model


def thread_in_generate(words: Words) -> object:
    """The interpreter waits for a thread that is not a daemon, and for its call."""
    model, kept = _opened(words)
    threading.Thread(target=generate, args=(load(words),)).start()
    return model, kept


def atexit_of_the_user(words: Words) -> object:
    """A function that was registered first runs last: after the client has closed."""
    import atexit

    kept: list[Any] = []
    atexit.register(lambda: (kept[0][1][1].close(), refused(kept[0][0])))
    kept.append(_opened(words))
    return kept


# -- Children ------------------------------------------------------------------------------------


def _wait(pid: int) -> None:
    """Print the status of a child; ends it when its time is over."""
    deadline = time.monotonic() + CHILD_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            say("child ended", os.waitstatus_to_exitcode(status))
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    say("child hangs", pid)


def _fork(model: Any, child: Callable[[], None], *, exits: bool = True) -> None:
    """Fork, and let the child end by `sys.exit` or `os._exit`."""
    pid = os.fork()
    if pid:
        _wait(pid)
        return
    child()
    if exits:
        sys.exit(0)
    os._exit(0)


def _around_fork(words: Words, child: Callable[[Any], None], *, exits: bool = True) -> object:
    """The parent generates, forks, and generates in its session and outside it."""
    model = load(words)
    generate(model)
    with model.inference_session(max_length=64) as session:
        generate(model)
        _fork(model, lambda: child(model), exits=exits)
        session.position, session.output_ids = 0, None
        generate(model)
    generate(model)
    return model


def fork_and_exit(words: Words) -> object:
    return _around_fork(words, lambda model: None)


def fork_and_os_exit(words: Words) -> object:
    return _around_fork(words, lambda model: None, exits=False)


def fork_and_collect(words: Words) -> object:
    """The child drops everything that it has inherited."""
    model = load(words)
    generate(model)
    pid = os.fork()
    if pid == 0:
        del model
        gc.collect()
        sys.exit(0)
    _wait(pid)
    generate(model)
    return model


def fork_and_generate(words: Words) -> object:
    """The inherited session is refused; outside it the child has a connection of its own."""

    def child(model: Any) -> None:
        refused(model)
        fresh = load(words)
        generate(fresh)
        session = model.remote_blocks.open_session(max_length=64)
        generate(model, session=session)
        KEPT.append(session)

    return _around_fork(words, child)


def fork_between_passes(words: Words) -> object:
    """The backward pass is for the process that ran the forward pass."""
    model = load(words)
    ids = torch.tensor([PROMPT])
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, labels=ids, use_cache=False).loss

    def child() -> None:
        try:
            loss.backward()
        except PetalsError as error:
            say("refused", [type(error).__name__, str(error)])

    _fork(model, child)
    loss.backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0
    generate(model)
    return model


def preload(words: Words) -> object:
    """Two workers of a model that the parent has loaded, and the parent, as gunicorn does it."""
    model = load(words)
    _workers(model)
    generate(model)
    return model


def preload_after_use(words: Words) -> object:
    """The same, when a thread of the parent generates meanwhile."""
    model = load(words)
    generate(model)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            model.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_NEW, do_sample=False)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(3):
        _workers(model)
    stop.set()
    thread.join(CHILD_SECONDS)
    generate(model)
    return model


def _workers(model: Any) -> None:
    pids = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            generate(model)
            generate(model)
            sys.exit(0)
        pids.append(pid)
    for pid in pids:
        _wait(pid)


def _work(model: Any) -> None:
    generate(model)
    KEPT.append(model.remote_blocks.open_session(max_length=64))
    generate(model, session=KEPT[-1])


def _load_and_work(words: Words) -> None:
    _work(load(words))


def _process(method: str, target: Callable[[Any], None], argument: object) -> None:
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=target, args=(argument,))
    process.start()
    process.join(CHILD_SECONDS)
    say("child ended", process.exitcode)
    process.kill()


def multiprocessing_fork(words: Words) -> object:
    model = load(words)
    _process("fork", _work, model)
    generate(model)
    _process("fork", _work, model)
    generate(model)
    return model


def multiprocessing_spawn(words: Words) -> object:
    return _with_fresh_workers(words, "spawn")


def multiprocessing_forkserver(words: Words) -> object:
    return _with_fresh_workers(words, "forkserver")


def _with_fresh_workers(words: Words, method: str) -> object:
    model, kept = _opened(words)
    _process(method, _load_and_work, words)
    kept[1].position, kept[1].output_ids = 0, None
    generate(model)
    return model, kept


def popen(words: Words) -> object:
    model, kept = _opened(words)
    done = subprocess.run(
        [sys.executable, "-c", "print(1)"], capture_output=True, text=True, timeout=CHILD_SECONDS
    )
    say("child ended", done.returncode)
    kept[1].position, kept[1].output_ids = 0, None
    generate(model)
    return model, kept


class Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Items whose making needs the model: its embeddings, or its text."""

    def __init__(self, model: Any, generates: bool) -> None:
        self.model, self.generates = model, generates

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        ids = torch.tensor([PROMPT])
        if not self.generates:
            embedded: torch.Tensor = self.model.get_input_embeddings()(ids).detach()
            return embedded
        new: torch.Tensor = self.model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False)
        return new


def _loader(model: Any, generates: bool = True) -> Any:
    return torch.utils.data.DataLoader(
        Texts(model, generates), num_workers=2, batch_size=None, timeout=CHILD_SECONDS
    )


def data_loader(words: Words) -> object:
    """Workers hold the model, and use it, while the parent generates."""
    model = load(words)
    for generates in (False, True, True):
        for item in _loader(model, generates):
            if generates:
                say("tokens", item[0].tolist())
            generate(model)
    return model


def data_loader_in_a_session(words: Words) -> object:
    model, kept = _opened(words)
    for _ in _loader(model, generates=False):
        pass
    try:
        for item in _loader(model):
            say("tokens", item[0].tolist())
    except PetalsError as error:
        say("refused", [type(error).__name__, str(error)])
    kept[1].position, kept[1].output_ids = 0, None
    generate(model)
    return model, kept


KEPT: list[object] = []
"""Lives until the modules of the interpreter are torn down."""

ENDS = (
    end_of_script,
    system_exit,
    exception,
    suspended_generator,
    generator_in_a_cycle,
    generator_beside_a_thread,
    daemon_thread_in_generate,
    thread_in_generate,
    atexit_of_the_user,
)
FORKS = (
    fork_and_exit,
    fork_and_os_exit,
    fork_and_collect,
    fork_and_generate,
    fork_between_passes,
    preload,
    preload_after_use,
    multiprocessing_fork,
    multiprocessing_spawn,
    multiprocessing_forkserver,
    popen,
    data_loader,
    data_loader_in_a_session,
)
SHAPES = {shape.__name__: shape for shape in (*ENDS, *FORKS)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    KEPT.append(SHAPES[sys.argv[1]](sys.argv[2:]))
    say("end of script", os.getpid())

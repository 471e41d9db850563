"""`petals chat` with a model that repeats the question, run as a script: no swarm, no torch.

A question that begins with "for ever" is answered with two words and then waits for Ctrl-C; "fail"
fails after one word; "stuck" waits in the clean-up, too. What the model was shown goes to the file
that PETALS_TEST_PROMPTS names.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy

from petals.cli.commands import chat
from petals.cli.main import app
from petals.cli.terminal.client_model import ClientModel
from petals.cli.terminal.console import run_as_command
from petals.client.trace import SessionTrace
from petals.errors import MissingBlocksError

PROMPTS = Path(os.environ["PETALS_TEST_PROMPTS"])


class Tokenizer:
    """One token per character."""

    chat_template = None

    def __call__(self, text: str, **options: object) -> dict[str, object]:
        with PROMPTS.open("a", encoding="utf-8") as out:
            out.write(repr(text) + "\n")
        return {"input_ids": numpy.array([[ord(char) for char in text]])}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


def wait_for_ctrl_c() -> None:
    """For a minute, in short pauses: Python notices a signal that comes just before it begins to
    wait only after the wait.
    """
    for _ in range(1200):
        threading.Event().wait(0.05)


class Session:
    trace = SessionTrace((), (), (), ())


class Model:
    @contextlib.contextmanager
    def inference_session(self, max_length: int) -> Iterator[Session]:
        self.is_stuck = False
        try:
            yield Session()
        finally:
            if self.is_stuck:
                print(" ... closing", flush=True)
                wait_for_ctrl_c()

    def generate(self, input_ids, session, streamer, **options) -> None:
        text = "".join(map(chr, input_ids[0]))
        question = text.rpartition("user: ")[2].removesuffix("\nassistant:")
        streamer.put(input_ids)

        def put(words: str) -> None:
            streamer.put(numpy.array([ord(char) for char in words]))

        if question.startswith(("for ever", "stuck")):
            self.is_stuck = question == "stuck"
            put("once upon")
            wait_for_ctrl_c()
        elif question == "fail":
            put("par")
            raise MissingBlocksError("No server has blocks 0:2.")
        put(f"<{len(question)}: {question[:60]}>")
        streamer.end()


@contextlib.contextmanager
def load_client(model: str, config: object) -> Iterator[ClientModel]:
    yield ClientModel(model=Model(), tokenizer=Tokenizer())  # type: ignore[arg-type]


if __name__ == "__main__":
    chat.load_client = load_client
    run_as_command(app)

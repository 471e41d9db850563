"""`petals demo`: a real model answers, served by real processes on this machine.

Combines the demo model, a local swarm and a client. Must not know tensors and messages.
"""

import sys
from typing import Annotated

import typer

from petals.cli.commands.swarm import introduce, spans_of, stay_up
from petals.cli.terminal import options
from petals.cli.terminal.answer import WordStream, ask, describe
from petals.cli.terminal.chat_template import ChatTemplate
from petals.cli.terminal.client_model import open_client
from petals.cli.terminal.console import interruptible, say, stage
from petals.cli.terminal.wording import utf8
from petals.client.config import ClientConfig
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig

DEMO_MODEL = "smollm2"


def demo(
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What to ask.")
    ] = "Why is the sky blue? Answer in one short paragraph.",
    servers: Annotated[int, typer.Option(min=1, metavar="N", help="How many servers.")] = 3,
    max_new_tokens: options.MaxNewTokens = 96,
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="Another model: a folder or repository.")
    ] = None,
    dtype: options.Dtype = "auto",
    keep: Annotated[bool, typer.Option("--keep", help="Stay up and print the address.")] = False,
) -> None:
    """Ask a small swarm on this machine a question.

    Fetches a small model, starts servers for it, and stops them after the answer.
    """
    prompt = utf8(prompt, "The prompt")
    with interruptible():
        source = model or _demo_model()
        with stage("Starting the swarm") as activity:
            swarm = LocalSwarm(LocalSwarmConfig(model=source, dtype=dtype), say=activity.change)
            swarm.start(lambda: spans_of(source, servers, None))
        with swarm:
            introduce(swarm)
            _ask(source, swarm, prompt, max_new_tokens)
            if keep:
                stay_up(swarm)
            say("Stopping the swarm")


def _demo_model() -> str:
    from petals.demo.model import get_demo_model

    with stage("Looking for the demo model") as activity:
        return str(get_demo_model(DEMO_MODEL, say=activity.change))


def _ask(source: str, swarm: LocalSwarm, prompt: str, max_new_tokens: int) -> None:
    config = ClientConfig(initial_peers=swarm.initial_peers, swarm_key=swarm.config.swarm_key)
    with open_client(source, config) as client:
        say(f"You: {prompt}")
        template = ChatTemplate(client.tokenizer, say)
        input_ids = template.encode([{"role": "user", "content": prompt}])
        stream = WordStream(client.tokenizer, _show)
        answer = ask(
            client.model, input_ids, stream, max_new_tokens=max_new_tokens, do_sample=False
        )
    _show("\n")
    say(describe(answer))


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

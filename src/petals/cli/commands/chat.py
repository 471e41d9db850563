"""`petals chat`: a conversation in the terminal. Knows the client's public names only."""

import sys
from typing import Annotated

import typer

from petals.cli.terminal import options
from petals.cli.terminal.answer import ChatMessage, WordStream, ask, describe, encode_chat
from petals.cli.terminal.client_model import ClientModel, load_client
from petals.cli.terminal.console import report, say
from petals.client.config import ClientConfig
from petals.errors import RequestError, RouteError, SessionError

HELP = "Type a line to ask, /new to forget the conversation, /quit or Ctrl-D to leave."


@options.with_config(ClientConfig, heading="Swarm")
def chat(
    config: ClientConfig,
    model: options.ModelArgument,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, metavar="T", help="0 takes the most probable token every time."),
    ] = 0.0,
    system: Annotated[
        str, typer.Option(metavar="TEXT", help="System prompt: the role of the model.")
    ] = "",
) -> None:
    """Talk with a model that a swarm serves."""
    opening: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
    with load_client(model, config) as client:
        say(HELP)
        messages = list(opening)
        while (line := _read_line()) is not None:
            if line == "/quit":
                break
            if line == "/new":
                messages = list(opening)
            elif line:
                messages.append({"role": "user", "content": line})
                _reply(client, messages, max_new_tokens, temperature)


def _read_line() -> str | None:
    """The next line, None at the end of input. The prompt sign is for terminals only."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.strip() if line else None


def _reply(
    client: ClientModel, messages: list[ChatMessage], max_new_tokens: int, temperature: float
) -> None:
    """Stream the answer and append it; a question that fails is reported and removed."""
    stream = WordStream(client.tokenizer, _show)
    try:
        answer = ask(
            client.model,
            encode_chat(client.tokenizer, messages),
            stream,
            max_new_tokens=max_new_tokens,
            **client.sampling(temperature, seed=None),
        )
    except (RequestError, RouteError, SessionError) as error:
        _show("\n")
        report(error)
        messages.pop()
        return
    _show("\n")
    say(describe(answer))
    messages.append({"role": "assistant", "content": answer.text})


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

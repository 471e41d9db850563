"""`petals generate`: one prompt, one answer. Knows the client's public names only."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from petals.cli.terminal import options
from petals.cli.terminal.answer import ChatReply, WordStream, ask, describe
from petals.cli.terminal.chat_template import ChatTemplate
from petals.cli.terminal.client_model import load_client
from petals.cli.terminal.console import print_json, say
from petals.cli.terminal.wording import utf8
from petals.client.config import ClientConfig
from petals.errors import BadInput


@options.with_config(ClientConfig, heading="Swarm")
def generate(
    config: ClientConfig,
    model: options.ModelArgument,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What to continue, or to ask with --chat.")
    ],
    max_new_tokens: options.MaxNewTokens = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the chat template.")] = False,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, metavar="T", help="0 takes the most probable token every time."),
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Makes sampling repeatable.")
    ] = None,
    chat_template: options.ChatTemplateName = "",
    as_json: options.Json = False,
) -> None:
    """Continue one prompt with a model that a swarm serves."""
    prompt = utf8(prompt, "The prompt")
    if not prompt.strip():
        raise BadInput("The prompt is empty.", hint='Say --prompt "Once upon a time".')
    with load_client(model, config) as client:
        if chat:
            template = ChatTemplate(client.tokenizer, say, chat_template)
            input_ids = template.encode([{"role": "user", "content": prompt}])
        else:
            input_ids = client.tokenizer(prompt, return_tensors="pt")["input_ids"]
        stream = WordStream(client.tokenizer, _shower("" if chat else prompt, as_json))
        answer = ask(
            client.model,
            input_ids,
            stream,
            max_new_tokens=max_new_tokens,
            **client.sampling(temperature, seed),
        )
    if as_json:
        print_json(_as_json(model, prompt, answer))
    else:
        _show("\n")
        say(describe(answer))


def _shower(opening: str, as_json: bool) -> Callable[[str], None]:
    """Shows text as it arrives. ``opening`` is shown before the first of it, so that nothing of a
    request that fails reaches stdout.
    """
    waiting = [opening]

    def show(text: str) -> None:
        _show(waiting.pop() + text if waiting else text)

    return (lambda text: None) if as_json else show


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _as_json(model: str, prompt: str, answer: ChatReply) -> dict[str, object]:
    return {
        "model": model,
        "prompt": prompt,
        "text": answer.text,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_new_tokens": answer.num_new_tokens,
        "first_token_seconds": round(answer.first_token_seconds, 4),
        "total_seconds": round(answer.total_seconds, 4),
        "tokens_per_second": round(answer.tokens_per_second, 2),
        "route": [
            {
                "peer_id": hop.peer_id,
                "blocks": [hop.blocks.start, hop.blocks.end],
                "median_step_seconds": round(hop.median_seconds(), 5),
                "median_compute_seconds": round(hop.median_seconds("compute"), 5),
            }
            for hop in answer.trace.hops
        ],
        "edges": [
            {"near": edge.near, "far": edge.far, "way": str(edge.way)}
            for edge in answer.trace.edges
        ],
        "repairs": [
            {
                "peer_id": repair.peer_id,
                "blocks": [repair.blocks.start, repair.blocks.end],
                "reason": repair.reason,
                "stall_seconds": round(repair.stall_seconds, 3),
            }
            for repair in answer.trace.repairs
        ],
    }

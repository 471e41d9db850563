"""Opening a distributed model and its tokenizer for a command, and closing them again.

Knows the client's public names and the tokenizer of transformers; knows no servers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals import constants
from petals.cli.terminal import options
from petals.cli.terminal.console import say, stage
from petals.errors import ModelFilesBroken
from petals.imports import collector_at_rest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from petals.models.checkpoint.sources import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientModel:
    """A model whose blocks are in a swarm, with its tokenizer."""

    model: Any
    tokenizer: "PreTrainedTokenizerBase"

    def sampling(self, temperature: float, seed: int | None) -> dict[str, object]:
        """Arguments of `generate` for a temperature; 0 means greedy. Seeds torch if asked to."""
        if temperature == 0:
            return {"do_sample": False}
        if seed is not None:
            import torch

            torch.manual_seed(seed)
        return {"do_sample": True, "temperature": temperature}


@contextmanager
def load_client(
    model: str, join: list[str] | None, swarm_key: Path | None
) -> Iterator[ClientModel]:
    """`open_client` for the options of a command; says so once if the swarm has no key."""
    addresses = options.peers_to_join(join)
    swarm_key = swarm_key or constants.swarm_key_file()
    if swarm_key is None:
        say("This swarm has no key: whoever runs its servers can read what you type.")
    with open_client(model, addresses, swarm_key) as client:
        yield client


@contextmanager
def open_client(
    model: str, addresses: tuple[str, ...], swarm_key: Path | None
) -> Iterator[ClientModel]:
    """Load embeddings, head and tokenizer; connections are closed at the end.

    Raises ModelNotFound, ModelNotSupported, ModelFilesBroken, PickleCheckpointRefused.
    """
    with stage(f"Loading the client's share of {Path(model).name}"):
        with collector_at_rest():
            from petals.client.connection.event_loop import client_loop
            from petals.client.model.auto import AutoDistributedModelForCausalLM
            from petals.models.checkpoint.sources import open_checkpoint

        tokenizer = _load_tokenizer(open_checkpoint(model))
        client = AutoDistributedModelForCausalLM.from_pretrained(
            model, initial_peers=list(addresses), swarm_key=swarm_key
        )
    try:
        yield ClientModel(model=client, tokenizer=tokenizer)
    finally:
        client_loop.close()


def _load_tokenizer(checkpoint: "Checkpoint") -> "PreTrainedTokenizerBase":
    """Raises ModelFilesBroken for a model that comes without a usable one."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(checkpoint.folder or checkpoint.name)
    except (ValueError, OSError, ImportError) as error:
        raise ModelFilesBroken(
            f"{checkpoint.name} has no tokenizer that can be loaded: {_first_line(error)}",
            hint="Its folder needs tokenizer.json or the files of its own tokenizer, as the "
            "original repository has them; copy them there.",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

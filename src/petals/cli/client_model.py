"""Opening a distributed model and its tokenizer for a command, and closing them again.

Knows the client's public names and the tokenizer of transformers; knows no servers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals import constants
from petals.cli import options
from petals.cli.console import say, stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    Raises ConfigError (unknown model), BootstrapFailed, AdmissionDenied.
    """
    with stage(f"Loading the client's share of {Path(model).name}"):
        import transformers

        from petals.client.auto import AutoDistributedModelForCausalLM
        from petals.client.bridge import bridge
        from petals.models.sources import open_checkpoint

        checkpoint = open_checkpoint(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder or checkpoint.name)
        client = AutoDistributedModelForCausalLM.from_pretrained(
            model, initial_peers=list(addresses), swarm_key=swarm_key
        )
    try:
        yield ClientModel(model=client, tokenizer=tokenizer)
    finally:
        bridge.close()

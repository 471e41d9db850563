"""Opening a distributed model and its tokenizer for a command, and closing them again.

Knows the client's public names and the tokenizer of transformers. Must not know servers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals.cli.terminal import options
from petals.cli.terminal.console import say, stage
from petals.client.config import ClientConfig
from petals.errors import ModelFilesBroken, NotSupported
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
def load_client(model: str, config: ClientConfig) -> Iterator[ClientModel]:
    """`open_client` for the options of a command; warns if the swarm has no key.

    Raises ConfigError if no swarm is named.
    """
    options.peers_to_join(config.initial_peers)
    if config.swarm_key is None:
        say("This swarm has no key: the operators of its servers can read what you type.")
    with open_client(model, config) as client:
        yield client


@contextmanager
def open_client(model: str, config: ClientConfig) -> Iterator[ClientModel]:
    """Load embeddings, head and tokenizer; connections are closed at the end.

    Raises ModelNotFound, ModelNotSupported, ModelFilesBroken, PickleCheckpointRefused.
    """
    with stage(f"Loading the client's share of {Path(model).name}"):
        with collector_at_rest():
            from petals.client.connection.event_loop import client_loop
            from petals.client.model.auto import AutoDistributedModelForCausalLM
            from petals.models.checkpoint.sources import open_checkpoint

        tokenizer = load_tokenizer(open_checkpoint(model))
        client = AutoDistributedModelForCausalLM.from_pretrained(
            model, **{field.name: getattr(config, field.name) for field in fields(config)}
        )
    try:
        yield ClientModel(model=client, tokenizer=tokenizer)
    finally:
        client_loop.close()


def load_tokenizer(checkpoint: "Checkpoint") -> "PreTrainedTokenizerBase":
    """Raises ModelFilesBroken for a model that comes without a usable one, NotSupported for one
    that is Python code of the repository: such code is never run.
    """
    import transformers

    try:
        # Without trust_remote_code=False transformers asks on the terminal whether to run it.
        return transformers.AutoTokenizer.from_pretrained(
            checkpoint.folder or checkpoint.name,
            trust_remote_code=False,
            revision=checkpoint.access.revision or "main",
            cache_dir=checkpoint.access.cache_dir,
        )
    except (ValueError, OSError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise NotSupported(
                f"The tokenizer of {checkpoint.name} is Python code of its repository, which "
                "Petals does not run.",
                hint="Look for a repository of the model with a tokenizer.json that "
                "transformers reads without it.",
            ) from None
        raise ModelFilesBroken(
            f"{checkpoint.name} has no tokenizer that can be loaded: {_first_line(error)}",
            hint="Its folder needs tokenizer.json or the files of its own tokenizer, as the "
            "original repository has them; copy them there.",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

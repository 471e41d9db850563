"""Converts a pickle checkpoint to safetensors without running code from the pickle.

The files are read with torch's restricted unpickler (tensors only) and written to a temporary
folder beside the target, which is renamed at the end: the target either does not exist or is
complete. Knows nothing of blocks or servers.
"""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch._weights_only_unpickler import UnpicklingError
from transformers.modeling_utils import load_state_dict

from petals.errors import ConfigError, ModelFilesBroken, NotEnoughDisk, PickleCheckpointRefused
from petals.models.checkpoint.sources import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, Checkpoint

PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_FILE = "pytorch_model.bin"
COPIED_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files without weights that are copied to the target if the checkpoint has them."""

WriteProgress = Callable[[int, int, str], None]
"""Called with (files written, files in all, name of the file being written; "" at the end)."""


def convert_checkpoint(
    checkpoint: Checkpoint, target: Path, progress: WriteProgress = lambda done, total, name: None
) -> Path:
    """Write ``checkpoint``'s pickled weights as safetensors into the new folder ``target``.

    Returns ``target``. Raises ConfigError if it exists, ModelFilesBroken if there is nothing to
    convert or a file is damaged, PickleCheckpointRefused for a pickle that holds more than tensors,
    NotEnoughDisk before or while writing. After an error no partial files remain.
    """
    if target.exists():
        raise ConfigError(
            f"{target} exists already.", hint="Name a new folder, or delete this one first."
        )
    shards = [checkpoint.path(name) for name in _pickle_names(checkpoint)]
    target.parent.mkdir(parents=True, exist_ok=True)
    with _disk_errors(target), TemporaryDirectory(prefix=".convert-", dir=target.parent) as work:
        _check_disk_space(target.parent, sum(path.stat().st_size for path in shards))
        folder = Path(work) / target.name
        folder.mkdir()
        _write_shards(shards, folder, progress)
        for name in COPIED_FILES:
            found = checkpoint.find(name)
            if found is not None:
                shutil.copyfile(found, folder / name)
        folder.rename(target)
    return target


def _pickle_names(checkpoint: Checkpoint) -> list[str]:
    index = checkpoint.find(PICKLE_INDEX)
    if index is not None:
        try:
            weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
            names = {str(name) for name in weight_map.values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFilesBroken(
                f"{PICKLE_INDEX} is not an index.", hint="Download the model again."
            ) from error
        if any(Path(name).name != name for name in names):
            raise ModelFilesBroken(
                f"{PICKLE_INDEX} points outside its folder.", hint="Do not use this checkpoint."
            )
        return sorted(names)
    if checkpoint.find(PICKLE_FILE) is not None:
        return [PICKLE_FILE]
    raise ModelFilesBroken(
        f"{checkpoint.name} has no {PICKLE_FILE} to convert.",
        hint="If it has safetensors files already, use it as it is.",
    )


def _write_shards(shards: list[Path], folder: Path, progress: WriteProgress) -> None:
    total = len(shards)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, shard in enumerate(shards):
        file_name = SINGLE_FILE
        if total > 1:
            file_name = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
        progress(number, total, file_name)
        tensors = _read_pickle(shard)
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    progress(total, total, "")


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        entries = load_state_dict(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise PickleCheckpointRefused(
            f"{path.name} holds more than tensors, so it is not unpickled.",
            hint="Look for a safetensors copy of this model; do not load this file elsewhere.",
        ) from error
    except (EOFError, RuntimeError, ValueError, LookupError) as error:
        # LookupError: the unpickler takes from its empty stack.
        raise ModelFilesBroken(
            f"{path.name} is damaged: {error}", hint="Delete the file and download it again."
        ) from error
    tensors = {name: value for name, value in entries.items() if isinstance(value, torch.Tensor)}
    # Tied tensors share memory, which safetensors refuses to write: every name gets a copy.
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}


def _check_disk_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise _disk_full(folder, f"{needed_bytes:,} bytes are needed, {free_bytes:,} are free")


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(target.parent, "the disk became full") from error
        raise
    except SafetensorError as error:
        # safetensors reports an operating system error as text only (28 is ENOSPC).
        if "os error 28" in str(error) or "No space left" in str(error):
            raise _disk_full(target.parent, "the disk became full") from error
        raise


def _disk_full(folder: Path, detail: str) -> NotEnoughDisk:
    return NotEnoughDisk(
        f"There is no room in {folder} for the converted model: {detail}.",
        hint="Free some space, or give a target folder on a larger disk.",
    )

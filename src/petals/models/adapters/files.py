"""Reads and writes adapters in peft's format: ``adapter_config.json`` and
``adapter_model.safetensors``.

Finds the matrices for blocks in adapters of any model class that peft was wrapped around. Nothing
is unpickled. Knows no peers and no running model.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from petals.errors import AdapterRefused, ModelNotFound
from petals.models.adapters.config import LoraConfig
from petals.models.adapters.low_rank import Adapter, LowRank, Slot
from petals.models.checkpoint.hub import HubAccess
from petals.models.checkpoint.sources import CONFIG_FILE as MODEL_CONFIG_FILE
from petals.models.checkpoint.sources import SourceFiles, find_files
from petals.types import BlockSpan

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<path>.+)\.lora_(?P<which>[AB])\.weight")
_MAX_CONFIG_BYTES = 2**20
"""Largest config file (bytes) that is read; peft's are a few kilobytes."""


@dataclass(frozen=True, slots=True, eq=False)
class SavedAdapter:
    """An adapter as it is stored.

    rest: tensors outside the blocks (a trained head), by their names in the model's state dict.
    """

    config: LoraConfig
    adapter: Adapter
    rest: Mapping[str, Tensor] = field(default_factory=dict)


def read_adapter(
    source: str,
    layers_path: str,
    blocks: BlockSpan | None = None,
    access: HubAccess | None = None,
) -> SavedAdapter:
    """Read an adapter from a repository or a folder; load only the matrices for ``blocks``.

    layers_path: path of the list of layers in the base model (``ModelArch.layers_path``). blocks:
    None loads all. Raises ModelNotFound, and AdapterRefused for pickles, for methods other than
    LoRA and for files that do not contain what their config says.
    """
    files = find_files(source, access)
    config = LoraConfig.of(_read_config(files))
    weights = files.find(WEIGHTS_FILE)
    if weights is None:
        raise _no_weights(files)
    # The base model may lie anywhere inside the model that peft was wrapped around.
    in_block = re.compile(rf"(?:.*?\.)??{re.escape(layers_path)}\.(\d+)\.(.+)")
    pairs: dict[tuple[int, str, str], dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    try:
        with safe_open(weights, framework="pt") as file:
            for key in sorted(file.keys()):
                path, which = _parse(key, source)
                match = in_block.fullmatch(path)
                if match is None:
                    rest[_name_outside(path, which, source)] = file.get_tensor(key)
                elif which is None:
                    raise AdapterRefused(
                        f"{source} brings whole modules for blocks ({match[2][:80]}).",
                        hint="Blocks stay as they are; LoRA can be added to them.",
                    )
                elif blocks is None or int(match[1]) in blocks:
                    pair_key = (int(match[1]), match[2], path)
                    pairs.setdefault(pair_key, {})[which] = file.get_tensor(key)
    except SafetensorError as error:
        raise AdapterRefused(
            f"The {WEIGHTS_FILE} of {source} is not a whole safetensors file: {error}",
            hint="Download it again.",
        ) from error
    parts = {
        (block, module): _part(pair, path, config)
        for (block, module, path), pair in sorted(pairs.items())
    }
    return SavedAdapter(config, Adapter(parts), rest)


def base_of_adapter(source: str, access: HubAccess | None = None) -> str | None:
    """The model that an adapter of peft in ``source`` was made for; None if there is no adapter.

    As in transformers: a folder that also holds a model is that model. Raises ModelNotFound,
    AdapterRefused.
    """
    files = find_files(source, access)
    has_model = files.find(MODEL_CONFIG_FILE) is not None
    try:
        path = files.find(CONFIG_FILE)
    except ModelNotFound:  # the model's config comes from the cache, and the hub cannot be reached
        path = None
    if path is None:
        return None
    if files.folder is not None and has_model:
        return source
    base = _read_config(files).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise AdapterRefused(
            f"{source} is an adapter that does not say which model it is for.",
            hint="Load that model, then call model.load_adapter(NAME).",
        )
    return base


def write_adapter(
    folder: Path, saved: SavedAdapter, blocks_path: str, settings: Mapping[str, Any] | None = None
) -> None:
    """Write an adapter so that stock peft loads it on the whole model.

    blocks_path: path of the list of layers in that model. settings: added to the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for (block, module), part in saved.adapter.parts.items():
        path = f"{_PREFIX}{blocks_path}.{block}.{module}"
        tensors[f"{path}.lora_A.weight"] = part.a.detach().cpu().contiguous()
        tensors[f"{path}.lora_B.weight"] = part.b.detach().cpu().contiguous()
    for name, tensor in saved.rest.items():
        # A copy, because safetensors refuses tensors that share memory: those of tied modules.
        tensors[f"{_PREFIX}{name}"] = tensor.detach().cpu().contiguous().clone()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    content = saved.config.as_peft() | dict(settings or {})
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2, sort_keys=True), "utf-8")


def targeted_slots(
    config: LoraConfig, slots: Mapping[Slot, tuple[int, int]], blocks_path: str
) -> dict[Slot, str]:
    """The slots that the config targets, with the paths under which peft would find them."""
    named = {slot: f"{blocks_path}.{slot[0]}.{slot[1]}" for slot in slots}
    return {slot: path for slot, path in named.items() if config.targets(path, slot[0])}


def _read_config(files: SourceFiles) -> Mapping[str, Any]:
    path = files.find(CONFIG_FILE)
    if path is None:
        raise ModelNotFound(
            f"{files.name} has no {CONFIG_FILE}.",
            hint="Give what peft's save_pretrained() wrote: a folder, or a repository of the hub.",
        )
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError("too long")
        settings = json.loads(path.read_text("utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise AdapterRefused(
            f"The {CONFIG_FILE} of {files.name} cannot be read: {error}.",
            hint="Download it again.",
        ) from error
    return settings


def _no_weights(files: SourceFiles) -> AdapterRefused:
    if files.has(PICKLE_FILE):
        return AdapterRefused(
            f"{files.name} has its matrices as a pickle, and unpickling can run a stranger's code.",
            hint="Ask its maker to save it as safetensors: peft's save_pretrained() does.",
        )
    return AdapterRefused(f"{files.name} has no {WEIGHTS_FILE}.", hint="Download it again.")


def _parse(key: str, source: str) -> tuple[str, str | None]:
    """The path of the module and which of its two matrices the key names: "A", "B" or None.

    With None the key is that of a whole tensor and the path its name.
    """
    if not key.startswith(_PREFIX):
        raise AdapterRefused(
            f"{source} has a tensor {key[:80]!r}, which is none of peft's.",
            hint="Save it with peft's save_pretrained().",
        )
    path = key.removeprefix(_PREFIX)
    matrix = _MATRIX.fullmatch(path)
    if matrix is not None:
        return matrix["path"], matrix["which"]
    if "lora_" in path:
        raise AdapterRefused(
            f"{source} holds {path[:80]}, which is no matrix of plain LoRA.",
            hint="Plain LoRA on linear layers can be added to remote blocks.",
        )
    return path, None


def _name_outside(path: str, which: str | None, source: str) -> str:
    if which is not None:
        raise AdapterRefused(
            f"{source} also adapts {path[:80]}, which is not in a block.",
            hint="Embeddings and head stay with the client: stock peft adapts them there.",
        )
    return path


def _part(pair: dict[str, Tensor], path: str, config: LoraConfig) -> LowRank:
    if pair.keys() != {"A", "B"}:
        raise AdapterRefused(f"Of the two matrices for {path[:80]} one is missing.")
    rank, a, b = config.rank(path), pair["A"], pair["B"]
    if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == rank:
        raise AdapterRefused(
            f"The matrices for {path[:80]} are {list(a.shape)} and {list(b.shape)}; "
            f"the config says rank {rank}.",
            hint="Config and matrices belong to different adapters.",
        )
    scaling = config.scaling(path)
    if not math.isfinite(scaling):
        raise AdapterRefused(f"The scaling for {path[:80]} is not a number.")
    return LowRank(a, b, scaling)

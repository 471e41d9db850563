"""Finds a model's files in a hub repository or a local folder: its config and its tensor index.

Resolves names and refuses files that are not safe to read. Knows nothing of blocks or modules.
"""

import hashlib
import json
import logging
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from petals.errors import (
    ModelFilesBroken,
    ModelNotFound,
    ModelNotSupported,
    PickleCheckpointRefused,
)
from petals.models.checkpoint import hub
from petals.models.checkpoint.hub import HubAccess
from petals.types import ModelId

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_FILES = ("pytorch_model.bin.index.json", "pytorch_model.bin")
ALIASES = {
    "bigscience/bloom-petals": "bigscience/bloom",
    "bigscience/bloomz-petals": "bigscience/bloomz",
}
"""Names the original Petals gave to repackaged checkpoints -> the repositories they came from."""

_VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Config entries that may differ between copies of one model; they do not count in its id."""

_announced_aliases: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class SourceFiles:
    """The files of a hub repository or a local folder.

    ``folder`` is set for a local folder; otherwise ``name`` is a hub id. ``fresh``: the files that
    ``force_download`` has downloaded, which are not downloaded again.
    """

    name: str
    folder: Path | None = None
    access: HubAccess = field(default_factory=HubAccess)
    fresh: dict[str, Path | None] = field(default_factory=dict, compare=False, repr=False)

    def find(self, file_name: str) -> Path | None:
        """Local path of one file, downloaded first if necessary; None if there is no such file.

        Raises ModelNotFound (no such repository), NotEnoughDisk.
        """
        if self.folder is not None:
            path = self.folder / file_name
            return path if path.is_file() else None
        if file_name in self.fresh:
            return self.fresh[file_name]
        required = file_name == CONFIG_FILE
        found = hub.download(self.name, file_name, self.access, required=required)
        if self.access.force_download:
            self.fresh[file_name] = found
        return found

    def has(self, file_name: str) -> bool:
        """Whether the file exists. Does not download it: a pickle may be large."""
        if self.folder is not None:
            return (self.folder / file_name).is_file()
        return hub.has_file(self.name, file_name, self.access)

    @property
    def public_name(self) -> str:
        """A name that other peers may see: the repository, or the folder's name without its path.

        A path may reveal the user's name or the layout of the machine.
        """
        return self.name if self.folder is None else self.folder.resolve().name


@dataclass(frozen=True, kw_only=True)
class Checkpoint(SourceFiles):
    """The files of one model and its config."""

    config: PretrainedConfig

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> file name, from the index, or from the headers of the safetensors files.

        Weights are not downloaded for it.

        Raises PickleCheckpointRefused, ModelFilesBroken, NotEnoughDisk.
        """
        index_file, single_file = map(self._of_variant, (INDEX_FILE, SINGLE_FILE))
        index = self.find(index_file)
        if index is not None:
            return _read_index(index)
        if self.folder is None:
            names = hub.tensor_names(self.name, single_file, self.access)
            if names is not None:
                return dict.fromkeys(names, single_file)
        single = self.find(single_file)
        if single is not None:
            return dict.fromkeys(_tensor_names(single), single_file)
        if self.access.variant:
            raise ModelFilesBroken(
                f"{self.name} has no weights of the variant {self.access.variant!r}.",
                hint=f"They would be {single_file} or {index_file}. Leave variant out for the "
                "ordinary ones.",
            )
        if self.folder is not None:
            found = _map_loose_files(self.folder)
            if found:
                return found
        if any(self.has(name) for name in PICKLE_FILES):
            raise _pickle_refused(self.name)
        raise ModelFilesBroken(
            f"{self.name} has a config but no safetensors weights.",
            hint=f"The folder or repository needs {SINGLE_FILE} or {INDEX_FILE} with its shards.",
        )

    def _of_variant(self, file_name: str) -> str:
        """transformers' rule: ``model.safetensors`` -> ``model.fp16.safetensors``."""
        stem, _, end = file_name.rpartition(".")
        variant = self.access.variant
        return f"{stem}.{variant}.{end}" if variant else file_name

    @property
    def model_id(self) -> ModelId:
        """Default name in the swarm's directory: equal for all that load the same model.

        A repository is identified by its id and revision, a folder by its name and a digest of its
        config.
        """
        if self.folder is None:
            stem = f"{self.name}/{self.access.subfolder or ''}".rstrip("/").replace("/", "--")
            if self.access.revision not in (None, "main"):
                stem += f"@{self.access.revision}"
            return ModelId(stem)
        settings = json.loads((self.folder / CONFIG_FILE).read_text("utf-8"))
        for key in _VOLATILE_CONFIG_KEYS:
            settings.pop(key, None)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return ModelId(f"{self.folder.resolve().name}-{digest[:8]}")

    def path(self, file_name: str) -> Path:
        """Local path of one file, downloaded first if it is not in the cache.

        Raises ModelFilesBroken if the model has no such file, NotEnoughDisk if it does not fit.
        """
        found = self.find(file_name)
        if found is None:
            raise ModelFilesBroken(
                f"{self.name} lists {file_name} in its index, but the file is missing.",
                hint="Download the model again; an interrupted copy leaves such gaps.",
            )
        return found


def find_files(source: str, access: HubAccess | None = None) -> SourceFiles:
    """The folder or hub repository named ``source``.

    Raises ModelNotFound if ``source`` is a path and no folder is there.
    """
    folder = Path(source).expanduser()
    access = access or HubAccess()
    if folder.is_dir():
        if access.subfolder:
            source, folder = f"{source.rstrip('/')}/{access.subfolder}", folder / access.subfolder
            access = replace(access, subfolder=None)
        return SourceFiles(name=source, folder=folder, access=access)
    if folder.is_file() or source.startswith(("/", ".", "~")):
        raise _no_folder(source, folder.is_file())
    return SourceFiles(name=_follow_alias(source), access=access)


def open_checkpoint(source: str, access: HubAccess | None = None) -> Checkpoint:
    """Resolve a hub id or a folder and read its config; weights are not read or downloaded.

    Raises ModelNotFound for an unknown name, ModelNotSupported for a model that needs Python code
    from its repository, ModelFilesBroken for an unreadable config, NotEnoughDisk.
    """
    files = find_files(source, access)
    found = files.find(CONFIG_FILE)
    if found is None and files.folder is not None:
        raise ModelNotFound(
            f"The folder {source} has no {CONFIG_FILE}.",
            hint="Give the folder that save_pretrained() or a hub download filled.",
        )
    if found is None:
        raise ModelNotFound(
            f"The repository {files.name} has no {CONFIG_FILE}.",
            hint="Is it a model of transformers, and not an adapter, a GGUF file or a data set?",
        )
    config = _read_config(found, files.name)
    return Checkpoint(
        name=files.name,
        folder=files.folder,
        access=files.access,
        fresh=files.fresh,
        config=config,
    )


def _no_folder(source: str, is_file: bool) -> ModelNotFound:
    """The error for a ``source`` that is a path; asking the hub about it would only take time."""
    if is_file:
        return ModelNotFound(
            f"{source} is a file, not the folder of a model.",
            hint=f"Give the folder that holds {CONFIG_FILE} and the weights.",
        )
    return ModelNotFound(
        f"There is no folder {source}.",
        hint="Check the spelling of the path; a model of the hub is named OWNER/NAME.",
    )


def as_checkpoint(source: str | Checkpoint, access: HubAccess) -> Checkpoint:
    """``source`` itself if it is a checkpoint, else ``open_checkpoint(source, access)``."""
    return source if isinstance(source, Checkpoint) else open_checkpoint(source, access)


def _follow_alias(source: str) -> str:
    target = ALIASES.get(source)
    if target is None:
        return source
    if source not in _announced_aliases:
        _announced_aliases.add(source)
        logger.warning("%s is an old name: using %s", source, target)
    return target


def _read_config(path: Path, source: str) -> PretrainedConfig:
    try:
        settings: dict[str, Any] = json.loads(path.read_text("utf-8"))
        model_type = settings.get("model_type")
        if not isinstance(settings.get("quantization_config") or {}, dict):
            raise ValueError("quantization_config is no object")
    except (ValueError, AttributeError) as error:
        raise ModelFilesBroken(
            f"The {CONFIG_FILE} of {source}, or its quantization_config, is not a JSON object.",
            hint="Download the model again.",
        ) from error
    if model_type not in CONFIG_MAPPING:
        raise ModelNotSupported(
            _unsupported_reason(source, model_type, settings), hint=_UNSUPPORTED_HINT
        )
    try:
        return AutoConfig.from_pretrained(str(path.parent), trust_remote_code=False)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelFilesBroken(
            f"The {CONFIG_FILE} of {source} does not describe a {model_type}: {error}",
            hint="Download the model again, or update transformers.",
        ) from error


_UNSUPPORTED_HINT = (
    "Petals runs only code that ships with transformers. Update transformers if the model is "
    "newer than yours, or look for a repository converted to it."
)


def _unsupported_reason(source: str, model_type: object, settings: dict[str, Any]) -> str:
    if settings.get("auto_map"):
        return f"{source} needs Python code from its repository (trust_remote_code), which is off."
    return f"transformers does not know the model type {model_type!r} of {source}."


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        entries = {str(key): str(file) for key, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFilesBroken(
            f"{path.name} is not an index of safetensors files.", hint="Download the model again."
        ) from error
    # An index is untrusted input: a path in it must not lead to a file outside the checkpoint.
    for file_name in set(entries.values()):
        pure = PurePosixPath(file_name)
        if pure.is_absolute() or ".." in pure.parts or pure.suffix != ".safetensors":
            raise ModelFilesBroken(
                f"{path.name} points at {file_name!r}, which is not a safetensors file beside it.",
                hint="Do not use this checkpoint: its index was tampered with.",
            )
    return entries


def _map_loose_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file name of a folder without an index.

    ``consolidated`` files hold the same weights again under Mistral's own names and are left out.
    """
    files = sorted(
        path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated")
    )
    return {name: path.name for path in files for name in _tensor_names(path)}


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ModelFilesBroken(
            f"{path.name} is not a whole safetensors file: {error}",
            hint="Download it again; an interrupted copy looks like this.",
        ) from error


def _pickle_refused(source: str) -> PickleCheckpointRefused:
    target = source.rstrip("/").split("/")[-1] + "-safetensors"
    return PickleCheckpointRefused(
        f"{source} has only pickle weights (.bin), and unpickling can run a stranger's code.",
        hint=f"Convert it once, safely: petals models convert {source} {target}",
    )

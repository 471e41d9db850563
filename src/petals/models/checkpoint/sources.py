"""Where a model's files are: a hub repository or a local folder, its config and index of tensors.

Resolves names, refuses what is not safe to read, and downloads single files through the ordinary
hub cache (``HF_HUB_OFFLINE``, ``HF_HOME`` and tokens work as everywhere). Knows nothing of blocks
or modules.
"""

import errno
import hashlib
import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants as hub_constants
from huggingface_hub import (
    file_exists,
    hf_hub_download,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from petals.errors import (
    ModelFilesBroken,
    ModelNotFound,
    ModelNotSupported,
    NotEnoughDisk,
    PickleCheckpointRefused,
)
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
"""Names the original Petals gave to repackaged checkpoints -> what they were made from."""

_VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
_announced_aliases: set[str] = set()


@dataclass(frozen=True, kw_only=True, slots=True)
class HubAccess:
    """How to reach the hub; ``None`` means the hub library's own default."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class Files:
    """A hub repository or a local folder. ``folder`` is set if it is local, otherwise ``name`` is a
    hub id.
    """

    name: str
    folder: Path | None = None
    access: HubAccess = field(default_factory=HubAccess)

    def find(self, file_name: str) -> Path | None:
        """Local path of one file, downloaded first if need be; None if there is no such file.

        Raises ModelNotFound (no such repository), NotEnoughDisk.
        """
        if self.folder is not None:
            path = self.folder / file_name
            return path if path.is_file() else None
        return _download(self.name, file_name, self.access)

    def has(self, file_name: str) -> bool:
        """Whether the file exists, without downloading it: a pickle may be large."""
        if self.folder is not None:
            return (self.folder / file_name).is_file()
        revision, token = self.access.revision, self.access.token
        cached = try_to_load_from_cache(self.name, file_name, self.access.cache_dir, revision)
        if isinstance(cached, str) or _is_offline():
            return isinstance(cached, str)
        with _hub_errors(self.name, self.access):
            return file_exists(self.name, file_name, revision=revision, token=token)

    @property
    def public_name(self) -> str:
        """The repository; of a folder only its own name, since paths are nobody's business."""
        return self.name if self.folder is None else self.folder.resolve().name


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Files):
    """One model's files."""

    config: PretrainedConfig

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> file name, read from the index, or from the only file's header.

        Raises PickleCheckpointRefused, ModelFilesBroken, NotEnoughDisk.
        """
        index = self.find(INDEX_FILE)
        if index is not None:
            return _read_index(index)
        single = self.find(SINGLE_FILE)
        if single is not None:
            return dict.fromkeys(_tensor_names(single), SINGLE_FILE)
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

    @property
    def model_id(self) -> ModelId:
        """Default name in the directory: equal for all who load the same repository or folder."""
        if self.folder is None:
            stem = self.name.replace("/", "--")
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


def find_files(source: str, access: HubAccess | None = None) -> Files:
    """The folder or hub repository named ``source``. Raises ModelNotFound for a path to nothing."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Files(name=source, folder=folder)
    if folder.is_file() or source.startswith(("/", ".", "~")):
        raise _no_folder(source, folder.is_file())
    return Files(name=_follow_alias(source), access=access or HubAccess())


def open_checkpoint(source: str, access: HubAccess | None = None) -> Checkpoint:
    """Resolve a hub id or a folder and read its config; no weights are touched.

    Raises ModelNotFound for an unknown name, ModelNotSupported for a model that would need its
    repository's own code, ModelFilesBroken for an unreadable config.
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
    return Checkpoint(name=files.name, folder=files.folder, access=files.access, config=config)


def _no_folder(source: str, is_file: bool) -> ModelNotFound:
    """What was typed is a path, so that asking the hub for it would only cost time."""
    if is_file:
        return ModelNotFound(
            f"{source} is a file, not the folder of a model.",
            hint=f"Give the folder that holds {CONFIG_FILE} and the weights.",
        )
    return ModelNotFound(
        f"There is no folder {source}.",
        hint="Check the spelling of the path; a model of the hub is named OWNER/NAME.",
    )


def opened(source: str | Checkpoint, access: HubAccess) -> Checkpoint:
    """``source`` itself if it is a checkpoint already, else ``open_checkpoint(source)``."""
    return source if isinstance(source, Checkpoint) else open_checkpoint(source, access)


def _follow_alias(source: str) -> str:
    target = ALIASES.get(source)
    if target is None:
        return source
    if source not in _announced_aliases:
        _announced_aliases.add(source)
        logger.warning("%s is an old name: using %s", source, target)
    return target


def _download(repo: str, file_name: str, access: HubAccess) -> Path | None:
    """The cached file, or None if the repository (offline: its cached copy) has no such file."""
    offline = _is_offline()
    try:
        with _hub_errors(repo, access):
            return Path(
                hf_hub_download(
                    repo,
                    file_name,
                    revision=access.revision,
                    token=access.token,
                    cache_dir=access.cache_dir,
                    local_files_only=offline,
                )
            )
    except LocalEntryNotFoundError as error:
        if offline and file_name != CONFIG_FILE:
            return None
        raise ModelNotFound(
            f"{file_name} of {repo} is not in the cache and the hub cannot be reached.",
            hint="Check the spelling and the connection (HF_HUB_OFFLINE must not be set), or give "
            "the path of a local folder, for example ./my-model.",
        ) from error
    except EntryNotFoundError:
        return None


def _is_offline() -> bool:
    """Whether only the cache can answer: asked to, or the hub's name leads nowhere.

    Without a network the hub's client would try again and again for half a minute.
    """
    if is_offline_mode():
        return True
    if getproxies():
        return False  # a proxy looks names up itself
    try:
        socket.getaddrinfo(urlsplit(hub_constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


@contextmanager
def _hub_errors(repo: str, access: HubAccess) -> Iterator[None]:
    try:
        yield
    except EntryNotFoundError:
        raise
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{repo} is gated and this machine may not read it.",
            hint=f"Accept its terms at https://huggingface.co/{repo}, then run: hf auth login",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFound(
            f"{repo} is neither a folder here nor a repository on the hub.",
            hint="Check the spelling (OWNER/NAME on the hub, ./PATH here); "
            "for a private repository run: hf auth login",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(
            f"{repo} has no revision {access.revision}.",
            hint=f"See https://huggingface.co/{repo}/tree/main for branches and tags.",
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NotEnoughDisk(
                f"The disk is full while downloading {repo}.",
                hint="Free some space, or point HF_HOME or --cache-dir at a larger disk.",
            ) from error
        raise


def _read_config(path: Path, source: str) -> PretrainedConfig:
    try:
        settings: dict[str, Any] = json.loads(path.read_text("utf-8"))
        model_type = settings.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelFilesBroken(
            f"The {CONFIG_FILE} of {source} is not a JSON object.",
            hint="Download the model again.",
        ) from error
    if model_type not in CONFIG_MAPPING:
        raise ModelNotSupported(_foreign_code(source, model_type, settings), hint=_FOREIGN_HINT)
    try:
        return AutoConfig.from_pretrained(str(path.parent), trust_remote_code=False)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelFilesBroken(
            f"The {CONFIG_FILE} of {source} does not describe a {model_type}: {error}",
            hint="Download the model again, or update transformers.",
        ) from error


_FOREIGN_HINT = (
    "Petals runs only code that ships with transformers. Update transformers if the model is "
    "newer than yours, or look for a repository converted to it."
)


def _foreign_code(source: str, model_type: object, settings: dict[str, Any]) -> str:
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
    for file_name in set(entries.values()):
        pure = PurePosixPath(file_name)
        if pure.is_absolute() or ".." in pure.parts or pure.suffix != ".safetensors":
            raise ModelFilesBroken(
                f"{path.name} points at {file_name!r}, which is not a safetensors file beside it.",
                hint="Do not use this checkpoint: its index was tampered with.",
            )
    return entries


def _map_loose_files(folder: Path) -> dict[str, str]:
    """Tensors of a folder without index; Mistral's own ``consolidated`` copies do not count."""
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

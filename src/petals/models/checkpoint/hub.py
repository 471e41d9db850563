"""Downloads single files of hub repositories through the ordinary hub cache.

``HF_HUB_OFFLINE``, ``HF_HOME``, proxies and tokens work as in every program that uses
huggingface_hub. Errors of the hub become errors of ours. Knows nothing of configs or tensors.
"""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import getproxies

from cachetools import TTLCache, cached
from huggingface_hub import constants as hub_constants
from huggingface_hub import (
    file_exists,
    get_session,
    hf_hub_download,
    is_offline_mode,
    parse_safetensors_file_metadata,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from petals.errors import ModelFilesBroken, ModelNotFound, NotEnoughDisk
from petals.logs import download_bar

PROBE_SECONDS = 5.0
"""Longest time (s) in which the hub, or the proxy before it, must connect, and then answer."""

PROBE_VALID_SECONDS = 60.0
"""How long (s) it is not asked again whether the hub answers: a model has many files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubAccess:
    """Which files of a repository, and how to reach the hub.

    None means huggingface_hub's own default. subfolder, variant: as in transformers, also of a
    local folder. force_download: each file once for each model that is opened. local_files_only:
    the cache alone is read.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    force_download: bool = False
    local_files_only: bool = False

    def path(self, file_name: str) -> str:
        """Path of a file inside the repository."""
        return f"{self.subfolder}/{file_name}" if self.subfolder else file_name


def download(repo: str, file_name: str, access: HubAccess, *, required: bool) -> Path | None:
    """Local path of one file of ``repo``, from the cache or downloaded into it.

    None if the repository has no such file, and, while offline, if an optional file is not in the
    cache: the cache cannot say whether the repository has it. Raises ModelNotFound (unknown, gated
    or unreachable repository, unknown revision) and NotEnoughDisk.
    """
    obstacle = _obstacle(access)
    try:
        with _hub_errors(repo, access):
            return Path(
                hf_hub_download(
                    repo,
                    access.path(file_name),
                    revision=access.revision,
                    token=access.token,
                    cache_dir=access.cache_dir,
                    force_download=access.force_download and obstacle is None,
                    local_files_only=obstacle is not None,
                    tqdm_class=download_bar(),
                )
            )
    # This subclass of EntryNotFoundError means "neither cached nor reachable", not "no such file".
    except LocalEntryNotFoundError as error:
        if obstacle and not required:
            return None
        reason = "was not asked (local_files_only)" if access.local_files_only else None
        raise ModelNotFound(
            f"{access.path(file_name)} of {repo} is not in the cache and the hub "
            f"{reason or 'cannot be reached: ' + (obstacle or 'the download broke off')}.",
            hint="Check the spelling and the connection (HF_HUB_OFFLINE must not be set), or give "
            "the path of a local folder, for example ./my-model.",
        ) from error
    except EntryNotFoundError:
        return None


def has_file(repo: str, file_name: str, access: HubAccess) -> bool:
    """Whether ``repo`` has the file, without downloading it; offline: whether it is in the cache.

    Raises what ``download`` raises for a repository that cannot be read.
    """
    revision, token = access.revision, access.token
    path = access.path(file_name)
    cached = try_to_load_from_cache(repo, path, access.cache_dir, revision)
    if isinstance(cached, str) or _obstacle(access) is not None:
        return isinstance(cached, str)
    with _hub_errors(repo, access):
        return file_exists(repo, path, revision=revision, token=token)


def tensor_names(repo: str, file_name: str, access: HubAccess) -> list[str] | None:
    """The names of the tensors of a safetensors file that is not in the cache, from its header.

    None if the file is in the cache, if only the cache can be used, or if there is no such file.
    """
    path = access.path(file_name)
    cached_file = try_to_load_from_cache(repo, path, access.cache_dir, access.revision)
    if isinstance(cached_file, str) or _obstacle(access) is not None:
        return None
    try:
        with _hub_errors(repo, access):
            header = parse_safetensors_file_metadata(
                repo, path, revision=access.revision, token=access.token
            )
    except EntryNotFoundError:
        return None
    except SafetensorsParsingError as error:
        raise ModelFilesBroken(
            f"{file_name} of {repo} is no safetensors file: {error}",
            hint="The repository is damaged; use another.",
        ) from error
    except HTTPError as error:
        raise ModelNotFound(
            f"The header of {file_name} of {repo} cannot be read from the hub: {error}.",
            hint="Try again later, or give the path of a local folder, for example ./my-model.",
        ) from error
    return list(header.tensors)


def _obstacle(access: HubAccess) -> str | None:
    """Why only the cache can be used; None if the hub answers."""
    if access.local_files_only:
        return "local_files_only is set"
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return _probe(hub_constants.ENDPOINT, tuple(sorted(getproxies().items())))


@cached(TTLCache(maxsize=4, ttl=PROBE_VALID_SECONDS), lock=threading.Lock())
def _probe(endpoint: str, proxies: tuple[tuple[str, str], ...]) -> str | None:
    """Ask the hub for an answer once, whichever; the reason if there is none.

    huggingface_hub itself retries for 30 to 90 s before it reports a dead proxy or network.
    """
    try:
        answer = get_session().head(endpoint, timeout=PROBE_SECONDS)
    except HTTPError as error:
        way = f" through the proxy for {', '.join(name for name, _ in proxies)}" if proxies else ""
        return f"{endpoint} does not answer{way} ({type(error).__name__})"
    if answer.status_code in (502, 503, 504):
        return f"{endpoint} answers with status {answer.status_code}"
    return None


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
                hint="Free some space, or point HF_HOME at a larger disk.",
            ) from error
        raise

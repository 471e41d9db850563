"""Downloads single files of hub repositories through the ordinary hub cache.

``HF_HUB_OFFLINE``, ``HF_HOME``, proxies and tokens work as in every program that uses
huggingface_hub. Errors of the hub become errors of ours. Knows nothing of configs or tensors.
"""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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
)

from petals.errors import ModelNotFound, NotEnoughDisk
from petals.logs import download_bar


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
    offline = access.local_files_only or _is_offline()
    try:
        with _hub_errors(repo, access):
            return Path(
                hf_hub_download(
                    repo,
                    access.path(file_name),
                    revision=access.revision,
                    token=access.token,
                    cache_dir=access.cache_dir,
                    force_download=access.force_download and not offline,
                    local_files_only=offline,
                    tqdm_class=download_bar(),
                )
            )
    # This subclass of EntryNotFoundError means "neither cached nor reachable", not "no such file".
    except LocalEntryNotFoundError as error:
        if offline and not required:
            return None
        reason = "was not asked (local_files_only)" if access.local_files_only else None
        raise ModelNotFound(
            f"{access.path(file_name)} of {repo} is not in the cache and the hub "
            f"{reason or 'cannot be reached'}.",
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
    if isinstance(cached, str) or access.local_files_only or _is_offline():
        return isinstance(cached, str)
    with _hub_errors(repo, access):
        return file_exists(repo, path, revision=revision, token=token)


def _is_offline() -> bool:
    """Whether only the cache can be used: set by the user, or the hub's host name has no address.

    The address is looked up first because huggingface_hub retries for about 30 s before it reports
    that there is no network.
    """
    if is_offline_mode():
        return True
    if getproxies():
        return False  # a proxy resolves host names itself
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
                hint="Free some space, or point HF_HOME at a larger disk.",
            ) from error
        raise

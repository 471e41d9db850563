"""`petals ls`, `pull` and `rm`: models in the caches of this machine.

Models are in the cache of the Hugging Face hub, and converted ones in that of Petals. Must not know
the network of petals.
"""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petals import constants
from petals.cli.terminal import options
from petals.cli.terminal.client_model import load_tokenizer
from petals.cli.terminal.console import print_data, print_json, print_table, say, stage
from petals.cli.terminal.wording import duration, size
from petals.errors import ConfigError, ModelNotFound
from petals.logs import plural
from petals.types import BlockSpan

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo

_MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedModel:
    """A model on this machine's disk; ``remove`` deletes its files."""

    name: str
    size_bytes: int
    used_at: float
    folder: Path
    remove: Callable[[], None] = field(repr=False)


def ls(cache_dir: options.CacheDir = None, as_json: options.Json = False) -> None:
    """List the models in the cache, with their sizes."""
    found = cached_models(cache_dir)
    if as_json:
        values = [
            {"name": each.name, "size_bytes": each.size_bytes, "folder": str(each.folder)}
            for each in found
        ]
        print_json({"models": values})
        return
    if not found:
        say("No models are in the cache. Download one: petals pull MODEL")
        return
    now = time.time()
    rows = [(each.name, size(each.size_bytes), duration(now - each.used_at)) for each in found]
    print_table(("MODEL", "SIZE", "LAST USED"), [(*row[:2], f"{row[2]} ago") for row in rows])
    say(f"{plural(len(found), 'model')}, {size(sum(each.size_bytes for each in found))}")


def pull(
    model: options.ModelArgument,
    blocks: Annotated[
        list[str] | None,
        typer.Option(metavar="A:B", help="Only the files that hold these blocks; repeatable."),
    ] = None,
    client: Annotated[
        bool, typer.Option("--client", help="Only what a client needs: both ends, tokenizer.")
    ] = False,
    revision: options.Revision = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Download a model into the cache: all of it, a server's blocks, or a client's share."""
    spans = [BlockSpan.parse(text) for text in blocks or ()]
    everything: list[BlockSpan | None] = [] if client else [None]
    with stage(f"Looking for {model}") as activity:
        from petals.models.checkpoint.hub import HubAccess
        from petals.models.checkpoint.sources import open_checkpoint
        from petals.models.loading.head import GENERATION_FILE, files_of_ends
        from petals.models.loading.split import files_of_blocks

        access = HubAccess(revision=revision, cache_dir=cache_dir)
        checkpoint = open_checkpoint(model, access)
        if checkpoint.folder is not None:
            raise ConfigError(
                f"{model} is a folder: there is nothing to download.",
                hint="Name a repository of the hub as OWNER/NAME.",
            )
        names: set[str] = set()
        for span in spans or everything:
            names |= files_of_blocks(checkpoint, span)
        if client or not spans:
            names |= files_of_ends(checkpoint)
        for number, name in enumerate(sorted(names), start=1):
            activity.change(f"File {number} of {len(names)}: {name}")
            checkpoint.path(name)
        if client or not spans:
            activity.change("The tokenizer")
            checkpoint.find(GENERATION_FILE)
            load_tokenizer(checkpoint)
        folder = checkpoint.path("config.json").parent
    total = sum((folder / name).stat().st_size for name in names)
    say(f"{checkpoint.name}: {plural(len(names), 'file')} with weights, {size(total)}")
    print_data(str(folder))


def rm(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Names as in petals ls.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Remove models from the cache, after a question."""
    there = {each.name: each for each in cached_models(cache_dir)}
    for name in models:
        if name not in there:
            raise ModelNotFound(
                f"{name} is not in the cache.", hint="petals ls lists the models that are."
            )
    chosen = [there[name] for name in dict.fromkeys(models)]
    total = size(sum(each.size_bytes for each in chosen))
    for each in chosen:
        say(f"{each.name}  {size(each.size_bytes)}  {each.folder}")
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(
                "Nothing was removed: this is no terminal to ask at.", hint="Say --yes."
            )
        typer.confirm(f"Remove {plural(len(chosen), 'model')}, {total}?", abort=True, err=True)
    for each in chosen:
        each.remove()
    say(f"Removed {plural(len(chosen), 'model')}, {total}.")


def cached_models(cache_dir: str | None = None) -> list[CachedModel]:
    """Models by name. ``cache_dir`` None is the hub's own choice of a folder."""
    return sorted([*_from_hub(cache_dir), *_converted()], key=lambda each: each.name)


def _from_hub(cache_dir: str | None) -> list[CachedModel]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir(cache_dir)
    except CacheNotFound:
        return []

    def remover(repo: "CachedRepoInfo") -> Callable[[], None]:
        hashes = [revision.commit_hash for revision in repo.revisions]
        return lambda: scan_cache_dir(cache_dir).delete_revisions(*hashes).execute()

    return [
        CachedModel(
            name=repo.repo_id,
            size_bytes=repo.size_on_disk,
            used_at=repo.last_accessed,
            folder=repo.repo_path,
            remove=remover(repo),
        )
        for repo in cache.repos
        if repo.repo_type == "model" and _is_model(repo)
    ]


def _is_model(repo: "CachedRepoInfo") -> bool:
    names = {file.file_name for revision in repo.revisions for file in revision.files}
    return bool(names.intersection(_MODEL_FILES))


def _converted() -> list[CachedModel]:
    """Models that Petals has converted; their name is their folder's, with its path."""
    root = constants.cache_dir() / "models"
    folders = [path.parent for path in root.glob("*/config.json")]
    return [
        CachedModel(
            name=folder.name,
            size_bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            used_at=max(file.stat().st_atime for file in folder.iterdir()),
            folder=folder,
            remove=lambda folder=folder: shutil.rmtree(folder),  # type: ignore[misc]
        )
        for folder in folders
    ]

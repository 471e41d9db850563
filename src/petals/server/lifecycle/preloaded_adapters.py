"""The operator's adapters: read from folders or the hub, checked, and moved to the blocks' device.

Knows no clients and no streams.
"""

from collections.abc import Sequence

from petals.errors import AdapterRefused, ConfigError
from petals.models.adapters.files import read_adapter
from petals.models.adapters.low_rank import Adapter, check_finite, check_fits
from petals.models.checkpoint.arch import describe
from petals.models.checkpoint.sources import Checkpoint, find_files
from petals.models.runtime.span import Span

MAX_ADAPTERS = 32
_MAX_NAME_LENGTH = 64
"""Characters; 32 names of this length fit a record of the directory."""


def read_preloaded(
    sources: Sequence[str], checkpoint: Checkpoint, span: Span
) -> dict[str, Adapter]:
    """Name -> the adapter's matrices for ``span``, in its dtype and on its device.

    The name is that of the repository or of the folder. Raises ModelNotFound, AdapterRefused (not
    LoRA, for another model, or with weights outside of blocks) and ConfigError (too many adapters,
    a name twice or too long).
    """
    if len(sources) > MAX_ADAPTERS:
        raise ConfigError(
            f"{len(sources)} adapters are too many for one server.",
            hint=f"Preload {MAX_ADAPTERS} at most; clients can send their own.",
        )
    layers_path = describe(checkpoint.config).layers_path
    found: dict[str, Adapter] = {}
    for source in sources:
        name = find_files(source, checkpoint.access).public_name
        if name in found or len(name) > _MAX_NAME_LENGTH:
            raise ConfigError(
                f"The adapter {source} would be announced as {name!r}, which "
                + ("another one is." if name in found else "is too long."),
                hint="Give its folder another name; clients ask for it by that.",
            )
        saved = read_adapter(source, layers_path, span.blocks, checkpoint.access)
        if saved.rest:
            raise AdapterRefused(
                f"{source} also replaces {next(iter(saved.rest))}, which clients hold.",
                hint="Clients load such an adapter themselves: model.load_adapter(FOLDER).",
            )
        check_fits(saved.adapter, span.slots)
        check_finite(saved.adapter)
        found[name] = saved.adapter.mapped(lambda tensor: tensor.to(span.device, span.dtype))
    return found

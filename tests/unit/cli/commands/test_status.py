"""Which models `petals status` lists: those that have servers."""

import pytest

from petals.cli.commands.status import served_models
from petals.errors import MissingBlocksError
from petals.swarm.directory.records import ModelSummary
from petals.types import ModelId


class Pictures:
    """Stands for a directory and its views: ``left`` is a model whose servers have all left."""

    def __init__(self, model: str = "", records: tuple[str, ...] = ()) -> None:
        self.model, self.records = model, records

    async def models(self) -> tuple[ModelSummary, ...]:
        names = ("here", "left")
        return tuple(ModelSummary(ModelId(name), 4, f"OWNER/{name}", 1) for name in names)

    async def view(self, model: str, num_blocks: int, whole: bool) -> "Pictures":
        return Pictures(model, () if model == "left" else ("server",))


@pytest.mark.parametrize("model", [None, "here", "OWNER/here"])
async def test_models_without_servers_are_not_listed(model: str | None) -> None:
    assert [view.model for view in await served_models(Pictures(), model)] == ["here"]


@pytest.mark.parametrize("model", ["left", "OWNER/left", "never"])
async def test_a_model_that_no_server_has_is_refused(model: str) -> None:
    with pytest.raises(MissingBlocksError, match=f"No server of this swarm has {model}") as caught:
        await served_models(Pictures(), model)
    assert caught.value.hint == "Models that have servers: here."

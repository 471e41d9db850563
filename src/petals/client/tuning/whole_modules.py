"""Modules outside the blocks that an adapter trains as a whole (peft's ``modules_to_save``).

While the adapter is there, each of them has parameters of its own, at its own place only: a head
that is tied to trained embeddings keeps the old weight. The originals are kept and come back
unchanged. Knows no files and no blocks.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from torch import Tensor, nn

from petals.errors import AdapterRefused


class Model(Protocol):
    """What is needed of a model: its modules and parameters by name.

    num_base_tokens: rows of the embeddings that were loaded.
    """

    num_base_tokens: int

    def get_input_embeddings(self) -> nn.Module: ...

    def get_output_embeddings(self) -> nn.Module | None: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def get_parameter(self, target: str) -> nn.Parameter: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]: ...


class WholeModules:
    """Parameters of an adapter in the places of a model's own.

    values: by name in the model's state dict. ``ties_weights`` (peft's ``ensure_weight_tying``):
    modules tied to one of these take the same parameter. names: the keys of ``values``.
    """

    def __init__(
        self,
        model: Model,
        values: Mapping[str, Tensor],
        *,
        is_trainable: bool,
        ties_weights: bool = False,
    ) -> None:
        self.names = tuple(values)
        self._originals: dict[str, nn.Parameter] = {}
        present = dict(model.named_parameters(remove_duplicate=False))
        for name, value in values.items():
            if name in self._originals:  # tied to an earlier one
                continue
            original = present[name]
            own = nn.Parameter(value.detach().to(original, copy=True), requires_grad=is_trainable)
            tied = [other for other, parameter in present.items() if parameter is original]
            for place in tied if ties_weights else [name]:
                self._originals[place] = original
                _put(model, place, own)

    def of(self, model: Model) -> dict[str, Tensor]:
        """The present parameters, by name."""
        return {name: model.get_parameter(name) for name in self.names}

    def restore(self, model: Model) -> None:
        """Put the originals back, in the present dtype and on the present device.

        Raises AdapterRefused, before anything changes, if a module has another shape by now.
        """
        present = {name: model.get_parameter(name) for name in self._originals}
        for name, original in self._originals.items():
            if present[name].shape != original.shape:
                raise AdapterRefused(
                    f"{name} was resized from {list(original.shape)} to "
                    f"{list(present[name].shape)} while the adapter was there, so the model cannot "
                    "go back to what it was before.",
                    hint="Load the model again, and resize it before an adapter is added.",
                )
        for name, original in self._originals.items():
            original.data = original.data.to(present[name])
            _put(model, name, original)


def parameters_of(model: Model, modules: Iterable[str]) -> dict[str, Tensor]:
    """Parameters of the modules that ``modules_to_save`` names, by name in the state dict.

    Raises AdapterRefused for a name that no module at the client has.
    """
    found: dict[str, Tensor] = {}
    for wanted in modules:
        own = {
            f"{path}.{name}": parameter
            for path, module in model.named_modules()
            if path == wanted or path.endswith(f".{wanted}")
            for name, parameter in module.named_parameters()
        }
        if not own:
            raise AdapterRefused(
                f"The client has no module {wanted!r} to train whole (modules_to_save).",
                hint="Embeddings, final norm and head are here; the blocks are on servers.",
            )
        found |= own
    return found


def resized_parameters(model: Model) -> dict[str, Tensor]:
    """Embeddings and head, by name, if ``resize_token_embeddings`` has changed their rows.

    The base model does not have these rows, so that they are saved, trained or not.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if len(embeddings.get_parameter("weight")) == model.num_base_tokens:
        return {}
    own = {id(parameter) for each in (embeddings, head) if each for parameter in each.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if id(parameter) in own}


def check_fits(model: Model, values: Mapping[str, Tensor]) -> None:
    """Raise AdapterRefused unless the model has a parameter for each value, of its shape."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in values.items():
        if name not in own:
            raise AdapterRefused(
                f"The adapter has {name} {list(tensor.shape)}, which this model does not have.",
                hint="Load it with the class it was made for (a classifier's with "
                "AutoDistributedModelForSequenceClassification).",
            )
        if own[name].shape != tensor.shape:
            raise AdapterRefused(
                f"The adapter has {name} {list(tensor.shape)}, this model {list(own[name].shape)}.",
                hint="Of embeddings with more tokens: call model.resize_token_embeddings(N) first. "
                "Otherwise it was made for another model.",
            )


def _put(model: Model, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, parameter)

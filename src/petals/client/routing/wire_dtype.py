"""In which dtype the states of a request travel, if the client asks for less than their own.

The client asks with ``wire_dtype`` in its config, or, as in the original, with a subclass of
RemoteSequenceManager that names compression types of hivemind in ``rpc_info`` or in
``get_request_metadata``. Knows no servers and no routes.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch

from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.errors import NotSupported

Protocol = Literal["rpc_forward", "rpc_inference"]

_CODECS: dict[int, torch.dtype | None] = {0: None, 2: torch.float16}
"""The compression types of hivemind that are offered: NONE and FLOAT16."""

_SCHEMAS = {"rpc_forward": "forward_schema", "rpc_inference": "inference_schema"}


def wire_dtype_of(manager: RemoteSequenceManager, protocol: Protocol) -> torch.dtype | None:
    """In which dtype states, answers and gradients of such requests travel; None: in their own.

    Raises NotSupported for other compression types of hivemind, and if gradients alone are to be
    compressed.
    """
    name = manager.config.wire_dtype
    dtype = None if name == "auto" else getattr(torch, name)
    if type(manager) is not RemoteSequenceManager:
        dtype = _asked_by_subclass(manager, protocol) or dtype
    return dtype


def _asked_by_subclass(manager: RemoteSequenceManager, protocol: Protocol) -> torch.dtype | None:
    asked = {_dtype_of(code) for code in _codes(manager, protocol)} - {None}
    if protocol == "rpc_forward":
        back = {_dtype_of(code) for code in _output_codes(manager, "rpc_backward")} - {None}
        if back - asked:
            raise NotSupported(
                "Gradients cannot be compressed without the states.",
                hint='Give output_compression for "rpc_forward", too.',
            )
    return asked.pop() if asked else None


def _codes(manager: RemoteSequenceManager, protocol: Protocol) -> Iterator[int]:
    yield from _output_codes(manager, protocol)
    if type(manager).rpc_info is not RemoteSequenceManager.rpc_info:
        positional, named = manager.rpc_info.get(_SCHEMAS[protocol]) or ((), {})
        for tensor in (*positional, *named.values()):
            yield int(tensor.compression)


def _output_codes(manager: RemoteSequenceManager, protocol: str) -> tuple[int, ...]:
    if type(manager).get_request_metadata is RemoteSequenceManager.get_request_metadata:
        return ()
    metadata: dict[str, Any] = manager.get_request_metadata(protocol, None, manager.block_uids)
    if metadata.get("active_adapter") != manager.config.active_adapter:
        raise NotSupported(
            "get_request_metadata() cannot choose another adapter.",
            hint="Set config.active_adapter.",
        )
    return tuple(int(code) for code in metadata.get("output_compression") or ())


def _dtype_of(code: int) -> torch.dtype | None:
    if code not in _CODECS:
        raise NotSupported(
            f"Compression type {code} of hivemind is not offered.",
            hint="NONE and FLOAT16 are; wire_dtype in the client's config also takes bfloat16.",
        )
    return _CODECS[code]

"""The original import path of `RemoteSequential`, which is in `client.model.remote_sequential`."""

from petals.client.model.remote_sequential import RemoteSequential

__all__ = ["RemoteSequential"]

"""The original import path of `InferenceSession`, which is in `client.model.inference_session`."""

from petals.client.model.inference_session import InferenceSession

__all__ = ["InferenceSession"]

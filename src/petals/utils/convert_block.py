"""The original's import path of the kinds of quantization, which are in ``models.loading``."""

from petals.models.loading.quantize import QuantKind as QuantType

__all__ = ["QuantType"]

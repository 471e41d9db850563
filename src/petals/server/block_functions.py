"""The original's import path of its limits of a short step. No part of this server reads them."""

MAX_SHORT_INFERENCE_TOKENS = 128
"""Most tokens of a step that the original's server ran in one piece."""

MAX_NF4_SHORT_INFERENCE_TOKENS = 1
"""The same for NF4 weights."""

"""What a result was taken on, in one line, for all result files."""

import os
import platform

import torch
import transformers

import petals


def describe_machine() -> str:
    """Processor, cores, load of the last minute, versions."""
    return (
        f"Machine: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f} at the end; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"petals {petals.__version__}."
    )

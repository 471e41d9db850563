"""What holds for every test, and for the processes that tests start."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

# One thread for torch: the suite shares small machines with the processes that it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell starts background jobs with SIGINT ignored. Children inherit that, but not a handler: one
# that does nothing keeps this process as it is, and lets the commands under test obey the signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda signum, frame: None)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_folder(model_type, layout=None)`` -> folder of a random tiny model.

    The same arguments give the same folder: no test may change it.
    """
    from petals.testing.tiny_models import write_tiny_model

    written: dict[tuple[object, ...], Path] = {}

    def write(model_type: str, layout: object = None) -> Path:
        key = (model_type, layout)
        if key not in written:
            folder = tmp_path_factory.mktemp("models") / model_type
            written[key] = write_tiny_model(folder, model_type, layout=layout)
        return written[key]

    return write


@pytest.fixture(scope="session")
def llama(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder("llama")


@pytest.fixture(scope="session")
def bloom(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder("bloom")

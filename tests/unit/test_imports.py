"""The collector rests while libraries are imported, and never longer."""

import gc
import subprocess
import sys

import pytest

from petals.imports import collector_at_rest


def test_the_collector_rests_inside_only() -> None:
    with pytest.raises(ImportError), collector_at_rest():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_at_rest():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_public_names_leave_it_on() -> None:
    code = "import gc, petals; petals.ClientConfig; print(gc.isenabled())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"

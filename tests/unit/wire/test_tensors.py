"""Tensors survive the wire exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petals.errors import ProtocolError
from petals.wire.frames import TensorSpec, check_specs
from petals.wire.tensors import DTYPES, decode, encode, narrowed

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@settings(max_examples=80, deadline=None)
@given(shape=shapes, dtype=st.sampled_from(sorted(DTYPES)), seed=st.integers(0, 2**16))
def test_a_round_trip_is_exact(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 200
    tensor = values.to(DTYPES[dtype])
    spec, data = encode(tensor)
    assert spec.num_bytes == len(data)
    back = decode(spec, bytearray(data))
    assert back.dtype == tensor.dtype and torch.equal(back, tensor)


def test_a_strided_view_arrives_in_its_own_order() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T[1:, ::2]
    spec, data = encode(tensor)
    assert torch.equal(decode(spec, bytearray(data)), tensor)


def test_a_dtype_that_does_not_travel_is_refused() -> None:
    with pytest.raises(ProtocolError, match="complex64"):
        encode(torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("object", (1,)),
        TensorSpec("float32", (-1,)),
        TensorSpec("float32", (2**20, 2**20)),
        TensorSpec("float32", (2**41, 0)),
        TensorSpec("float32", (1,) * 9),
    ],
)
def test_hostile_specs_are_refused_before_allocation(spec: TensorSpec) -> None:
    with pytest.raises(ProtocolError):
        check_specs([spec], max_bytes=2**30)


def test_the_cap_counts_all_tensors_of_a_message() -> None:
    spec = TensorSpec("float32", (100,))
    assert check_specs([spec, spec], max_bytes=800) == 800
    with pytest.raises(ProtocolError):
        check_specs([spec, spec, spec], max_bytes=800)


def test_a_tensor_shorter_than_its_spec_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode(TensorSpec("float32", (4,)), bytearray(12))


def test_a_narrower_dtype_makes_no_infinity() -> None:
    """Else an honest server's large output would look like a broken one."""
    states = torch.tensor([1.5, -1e6, 1e6, torch.inf, torch.nan])
    found = narrowed(states, torch.float16)
    assert found.dtype == torch.float16
    assert found[:4].tolist() == [1.5, -65504.0, 65504.0, torch.inf] and found[4].isnan()
    assert narrowed(states[:4], torch.bfloat16).equal(states[:4].bfloat16())

import pytest
import torch

from petals.errors import LengthExceeded, SessionGap
from petals.models.runtime.kv_layout import MIN_SLAB_TOKENS, BlockLayout, KVLayout, SlabRow
from petals.models.runtime.recurrent import RecurrentRow
from petals.types import BlockSpan
from support.models import WIDTH, whole_model

SPAN = BlockSpan(3, 5)


def states(count: int, mark: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((2, count, 4), mark), torch.full((1, count, 3), -mark)


class TestLearnedLayout:
    def test_grouped_heads(self) -> None:
        layout = whole_model("llama").layout
        assert layout.of(10).key_shape == layout.of(13).value_shape == (2, 8)
        assert layout.token_bytes(BlockSpan(10, 12)) == 2 * (2 * 8 + 2 * 8) * 4
        assert layout.state_bytes(layout.span) == 0

    def test_latent_attention_keeps_the_latent(self) -> None:
        layout = whole_model("deepseek_v3").layout
        assert layout.of(10).key_shape == (1, 16)
        assert layout.of(10).value_shape == (1, 8)

    def test_recurrent_blocks_keep_a_state_and_no_tokens(self) -> None:
        layout = whole_model("qwen3_next").layout
        recurrent, attending = layout.of(10), layout.of(12)
        assert recurrent.token_bytes == 0 and recurrent.state_bytes > 0
        assert attending.token_bytes > 0 and attending.state_bytes == 0
        assert layout.input_bytes == WIDTH * 4

    def test_keys_and_values_of_a_token_have_a_fixed_width(self) -> None:
        layout = whole_model("llama").layout
        assert layout.kv_dtype == torch.float32
        assert layout.kv_width(BlockSpan(11, 13)) == 2 * (2 * 8 + 2 * 8)

    def test_states_and_mixed_dtypes_cannot_be_moved(self) -> None:
        halves = BlockLayout(key_shape=(1, 2), value_shape=(1, 2), dtype=torch.float16)
        mixed = KVLayout(span=SPAN, blocks=(halves, BlockLayout(key_shape=(1, 2))))
        for layout in (mixed, whole_model("qwen3_next").layout):
            assert layout.kv_dtype is None and layout.kv_width(layout.span) == 0


class TestSlabRow:
    def test_views_hold_all_that_was_written(self) -> None:
        row = SlabRow(SPAN, 300)
        for start in range(0, 300, 60):
            keys, values = row.append(3, start, *states(60, start + 1.0))
        assert keys.shape == (2, 300, 4) and values.shape == (1, 300, 3)
        assert keys[0, ::60, 0].tolist() == [1.0, 61.0, 121.0, 181.0, 241.0]
        assert torch.equal(values[0, :, 0], -keys[1, :, 0])

    def test_memory_starts_small_and_never_passes_the_maximum(self) -> None:
        row = SlabRow(SPAN, 150)
        row.append(3, 0, *states(1, 1.0))
        per_token = (2 * 4 + 3) * 4
        assert row.num_bytes == MIN_SLAB_TOKENS * per_token
        row.append(3, 1, *states(149, 1.0))
        assert row.num_bytes == 150 * per_token

    def test_a_gap_would_show_strangers_memory(self) -> None:
        row = SlabRow(SPAN, 100)
        row.append(3, 0, *states(5, 1.0))
        with pytest.raises(SessionGap):
            row.append(3, 6, *states(1, 1.0))
        with pytest.raises(SessionGap):
            row.append(4, 5, *states(1, 1.0))

    def test_what_was_rolled_back_is_a_gap(self) -> None:
        row = SlabRow(SPAN, 100)
        row.append(3, 0, *states(5, 1.0))
        row.commit(5)
        row.truncate(2)
        with pytest.raises(SessionGap):
            row.append(3, 4, *states(1, 1.0))
        with pytest.raises(SessionGap):
            row.truncate(3)

    def test_the_maximum_is_kept(self) -> None:
        row = SlabRow(SPAN, 4)
        with pytest.raises(LengthExceeded) as error:
            row.append(3, 0, *states(5, 1.0))
        assert error.value.hint and not error.value.retryable

    def test_a_fork_shares_nothing(self) -> None:
        row = SlabRow(SPAN, 100)
        row.append(3, 0, *states(5, 1.0))
        row.commit(5)
        twin = row.fork()
        twin.append(3, 2, *states(1, 9.0))
        keys, _ = row.append(3, 5, *states(1, 2.0))
        assert keys[0, :, 0].tolist() == [1.0] * 5 + [2.0]
        assert not row.storages() & twin.storages()

    def test_a_fork_has_a_length_and_a_limit_of_its_own(self) -> None:
        row = SlabRow(SPAN, 500)
        row.append(3, 0, *states(300, 1.0))
        row.commit(300)
        twin = row.fork(length=7, max_length=9)
        assert (twin.length, twin.max_length, row.length) == (7, 9, 300)
        assert 40 * twin.num_bytes < 9 * row.num_bytes
        twin.append(3, 7, *states(2, 2.0))
        with pytest.raises(LengthExceeded):
            twin.append(3, 9, *states(1, 2.0))

    @pytest.mark.parametrize("values", [(1, 3), (0, 0)], ids=["pairs", "keys alone"])
    def test_what_one_row_reads_another_writes(self, values: tuple[int, int]) -> None:
        parts = (BlockLayout(key_shape=(2, 4), value_shape=values), BlockLayout())
        layout = KVLayout(span=SPAN, blocks=parts)
        row, twin = SlabRow(SPAN, 100), SlabRow(SPAN, 100)
        keys, pairs = torch.randn(2, 9, 4), torch.randn(values[0], 9, values[1])
        row.append(3, 0, keys, pairs)
        row.commit(9)
        assert row.read(2, 5).shape == (3, layout.kv_width(SPAN))
        twin.write(0, row.read(0, 5), layout)
        twin.write(5, row.read(5, 9), layout)
        assert twin.length == 9 and torch.equal(twin.read(0, 9), row.read(0, 9))
        copied = twin.append(3, 9, keys[:, :1], pairs[:, :1])
        assert torch.equal(copied[0][:, :9], keys) and torch.equal(copied[1][:, :9], pairs)
        with pytest.raises(SessionGap):
            row.read(2, 10)


def test_inputs_of_a_recurrent_row_never_pass_its_maximum() -> None:
    row = RecurrentRow(max_length=70)
    row.advance(torch.ones(3, 4), (3,) * 3)
    assert row.num_bytes == 64 * 4 * 4
    row.advance(torch.ones(67, 4), (70,) * 67)
    assert row.num_bytes == 70 * 4 * 4


def test_rewinding_without_snapshots_starts_over() -> None:
    row = RecurrentRow(max_length=10)
    inputs = torch.arange(6.0).view(6, 1)
    row.advance(inputs, (4, 4, 4, 4, 5, 6))
    missed = row.rewind(4)
    assert row.position == 0
    assert missed is not None and torch.equal(missed[0], inputs[:4])
    assert missed[1] == (4, 4, 4, 4)
    assert row.rewind(0) is None

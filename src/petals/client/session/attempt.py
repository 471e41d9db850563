"""One step of a session on its way: what is done, what remains, what servers must know for it.

Plain bookkeeping; knows no servers.
"""

from dataclasses import dataclass, field

from torch import Tensor

from petals.client.session.input_log import KeptInputs, Part
from petals.client.session.types import Piece
from petals.errors import PetalsError
from petals.types import PeerId


@dataclass(slots=True)
class Attempt:
    """One step of the session, cut into pieces for the path that is to run it.

    inputs: the rows as the step finds them; pieces that are done are added to it. ``rest`` is what
    remains, ``reorder`` what servers must do to their rows first.
    """

    inputs: KeptInputs
    rest: Part
    reorder: tuple[int, ...] | None
    cuts_rows: bool
    """It reorders rows or rolls some back: if it fails, the servers' rows are not ours any more."""
    num_rows_told: int
    """Rows that servers have before the reorder."""
    pieces: list[Piece] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    num_refusals: int = 0
    reconnected: set[PeerId] = field(default_factory=set)
    forgetful: set[PeerId] = field(default_factory=set)
    """Servers whose lease of the session ran out; each may say so once."""
    last_failure: PetalsError | None = None

    @property
    def told_lengths(self) -> tuple[int, ...]:
        """Tokens that the step needs of every row that servers have before its reorder."""
        if self.reorder is None:
            return self.inputs.lengths
        lengths = [0] * self.num_rows_told
        for row, length in zip(self.reorder, self.inputs.lengths):
            lengths[row] = max(lengths[row], length)
        return tuple(lengths)

    def settle(self) -> None:
        """Take the pieces that are done, from the first on, out of what remains."""
        while self.pieces and self.pieces[0].output is not None:
            piece = self.pieces.pop(0)
            assert piece.output is not None
            self.outputs.append(piece.output)
            self.inputs.append(piece.call.counts, piece.hidden)
            self.reorder, self.num_rows_told = None, len(piece.call.counts)
            starts = self.inputs.lengths
            counts = tuple(
                start + number - now
                for start, number, now in zip(self.rest.starts, self.rest.counts, starts)
            )
            self.rest = Part(starts, counts, self.rest.hidden[piece.call.num_tokens :])

"""What runs next: every reader between two words, then a bounded piece of somebody's prompt, then
a unit of a pass.

Values in, values out: no clock, no thread, no torch. The executor reports how long each batch took
(``observe``); from that the scheduler knows how many prompt tokens fit beside running decodes
without making them wait, and how large a unit of a pass may be. A pass counts in the tokens that
would take as long to run through the whole span.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from petals.server.compute.step_plan import WorkKind
from petals.server.policies import SchedulerConfig

_LEARNING_RATE = 0.3
_TYPICAL_TOKENS = 64.0
_DECODE_REMEMBERED_BATCHES = 16
"""So many batches after its last token a session still counts as decoding:

its next one is under way around the route.
"""


@dataclass(frozen=True, slots=True)
class WaitingWork:
    """One piece of work that asks for the device.

    ``owner`` is whoever must not get more than their share.
    """

    key: int
    owner: str
    kind: WorkKind
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Portion:
    """The next ``num_tokens`` tokens of work ``key`` belong to the batch; of a pass: about so many,
    as a unit that runs alone.
    """

    key: int
    num_tokens: int


class BatchCost:
    """Seconds of a batch as ``fixed + per_token * tokens``, learned from batches that have run."""

    def __init__(self, fixed_seconds: float = 0.0, seconds_per_token: float = 0.003) -> None:
        self._fixed = fixed_seconds
        self._slope = seconds_per_token * _TYPICAL_TOKENS

    @property
    def fixed_seconds(self) -> float:
        """What a batch costs before its first token."""
        return self._fixed

    def seconds(self, num_tokens: int) -> float:
        """Expected duration of a batch of ``num_tokens``."""
        return self._fixed + self._slope * num_tokens / _TYPICAL_TOKENS

    def tokens_within(self, seconds: float) -> int:
        """The largest batch expected to take at most ``seconds``; 0 if none does."""
        return max(0, int((seconds - self._fixed) * _TYPICAL_TOKENS / self._slope))

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Correct the estimate by a batch that has run (normalised least mean squares)."""
        size = num_tokens / _TYPICAL_TOKENS
        correction = _LEARNING_RATE * (seconds - self.seconds(num_tokens)) / (1 + size * size)
        self._fixed = max(0.0, self._fixed + correction)
        self._slope = max(1e-6, self._slope + correction * size)


class _Entry:
    __slots__ = ("waiting", "done", "order")

    def __init__(self, waiting: WaitingWork, order: int) -> None:
        self.waiting = waiting
        self.done = 0
        self.order = order

    @property
    def remaining(self) -> int:
        return max(0, self.waiting.num_tokens - self.done)


class Scheduler:
    """Waiting work, and the rule by which batches are made of it."""

    def __init__(self, config: SchedulerConfig, cost: BatchCost | None = None) -> None:
        self._config = config
        self.expect(cost or BatchCost())
        self._entries: dict[int, _Entry] = {}
        self._served: dict[str, int] = {}
        self._num_added = 0
        self._batches_since_decode = _DECODE_REMEMBERED_BATCHES
        self._batches_since_forward = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def waiting_tokens(self) -> int:
        """Tokens that still have to run."""
        return sum(entry.remaining for entry in self._entries.values())

    @property
    def num_decodes_alone(self) -> int:
        """Decodes that wait, if nothing else does; else 0."""
        kinds = [entry.waiting.kind for entry in self._entries.values()]
        return len(kinds) if all(kind is WorkKind.DECODE for kind in kinds) else 0

    @property
    def fixed_seconds(self) -> float:
        """What one more batch costs, however small it is."""
        return self._cost.fixed_seconds

    def add(self, waiting: WaitingWork) -> None:
        """Put new work in line.

        An owner who comes (back) starts level with those who have had least.
        """
        floor = min(self._served.values(), default=0)
        self._served[waiting.owner] = max(self._served.get(waiting.owner, 0), floor)
        self._entries[waiting.key] = _Entry(waiting, self._num_added)
        self._num_added += 1

    def discard(self, key: int) -> None:
        """Take work out of line, finished or not; unknown keys are nothing."""
        if self._entries.pop(key, None) is not None:
            self._forget_idle_owners()

    def expect(self, cost: BatchCost) -> None:
        """What batches will take, before any has run."""
        self._cost = cost
        self._unit_cost = BatchCost(cost.seconds(0), cost.seconds(1) - cost.seconds(0))

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A batch of ``num_tokens`` took ``seconds``."""
        self._cost.observe(num_tokens, seconds)

    def advance(self, key: int, num_tokens: int, seconds: float) -> None:
        """A unit of pass ``key``, cost_tokens ``num_tokens``, took ``seconds``."""
        self._unit_cost.observe(num_tokens, seconds)
        entry = self._entries.get(key)
        if entry is not None:
            entry.done += num_tokens
            self._served[entry.waiting.owner] += num_tokens

    def next_batch(self) -> tuple[Portion, ...]:
        """The portions that run together now; empty if nothing waits.

        Steps leave with their last portion, passes when they are discarded.
        """
        if not self._entries:
            return ()
        passes = self._in_turn(WorkKind.FORWARD)
        due = self._batches_since_forward >= self._config.forward_every
        if passes and (due or len(passes) == len(self._entries)):
            self._batches_since_forward = 0
            self._batches_since_decode += 1
            room = self._room_beside(0, self._unit_cost)
            return (Portion(passes[0].waiting.key, room),)
        decodes = self._take(
            self._in_turn(WorkKind.DECODE), self._config.max_batch_tokens, whole=True
        )
        self._batches_since_decode = 0 if decodes else self._batches_since_decode + 1
        num_decoding = sum(portion.num_tokens for portion in decodes)
        room = self._room_beside(num_decoding, self._cost)
        batch = decodes + self._take(self._in_turn(WorkKind.PREFILL), room)
        self._batches_since_forward = self._batches_since_forward + 1 if passes else 0
        self._account(batch)
        return batch

    def _room_beside(self, num_decoding: int, cost: BatchCost) -> int:
        """Tokens that still fit beside ``num_decoding`` tokens of decodes."""
        config = self._config
        busy = self._batches_since_decode < _DECODE_REMEMBERED_BATCHES
        budget = config.latency_budget_seconds if busy else config.idle_budget_seconds
        budget = max(budget, 2 * cost.seconds(num_decoding)) if num_decoding else budget
        fitting = cost.tokens_within(budget) - num_decoding
        return min(max(fitting, config.min_chunk_tokens), config.max_batch_tokens - num_decoding)

    def _in_turn(self, kind: WorkKind) -> list[_Entry]:
        """Who has had least comes first. Prompts of one owner take turns, passes do not: a pass
        holds memory until it is done.
        """
        turns = kind is not WorkKind.FORWARD
        entries = [entry for entry in self._entries.values() if entry.waiting.kind is kind]
        entries.sort(
            key=lambda entry: (
                self._served[entry.waiting.owner],
                entry.done if turns else 0,
                entry.order,
            )
        )
        return entries

    def _take(
        self, entries: Sequence[_Entry], room: int, whole: bool = False
    ) -> tuple[Portion, ...]:
        taken = []
        for entry in entries:
            num_tokens = min(entry.remaining, room)
            if (num_tokens == 0 and entry.remaining) or (whole and num_tokens < entry.remaining):
                break
            taken.append(Portion(entry.waiting.key, num_tokens))
            room -= num_tokens
        return tuple(taken)

    def _account(self, batch: Iterable[Portion]) -> None:
        for portion in batch:
            entry = self._entries[portion.key]
            entry.done += portion.num_tokens
            self._served[entry.waiting.owner] += portion.num_tokens
            if entry.remaining == 0:
                del self._entries[portion.key]
        self._forget_idle_owners()

    def _forget_idle_owners(self) -> None:
        owners = {entry.waiting.owner for entry in self._entries.values()}
        self._served = {owner: served for owner, served in self._served.items() if owner in owners}

"""Which steps a session has run, and which part of a replay it takes next, as tables."""

import pytest

from petals.errors import SessionGap
from petals.server.compute.step_job import StepPlan
from petals.server.session.rows import KEPT_STEPS, DoneStep, InboundReplay, StepHistory
from petals.wire.header import RequestHeader
from petals.wire.requests import ReplayPart, Step

SESSION = b"s" * 16
TIMING = (0.0, 0.0, 1)


def part(replay: int, index: int, ends: bool = False) -> ReplayPart:
    return ReplayPart(RequestHeader(SESSION, 0, replay), index, 7, (0,), (1,), ends=ends)


def step(step_id: int, starts: tuple[int, ...], counts: tuple[int, ...], reorder=None) -> Step:
    return Step(RequestHeader(SESSION, 0, step_id), starts, counts, reorder)


class TestInboundReplay:
    """Parts (replay, index, what becomes of them) and steps have touched the rows; a part comes."""

    @pytest.mark.parametrize(
        ("story", "comes", "outcome"),
        [
            ([], (3, 0), "taken"),
            ([], (3, 1), "refused"),
            ([(3, 0, "done")], (3, 1), "taken"),
            ([(3, 0, "done")], (3, 0), "dropped"),
            ([(3, 0, "done")], (3, 2), "refused"),
            ([(3, 0, "done"), (3, 1, "done")], (3, 0), "dropped"),
            ([(3, 0, "ends")], (3, 1), "refused"),
            ([(3, 0, "fails")], (3, 1), "refused"),
            ([(3, 0, "fails")], (3, 0), "dropped"),
            ([(3, 0, "fails")], (4, 0), "taken"),
            ([(3, 0, "done")], (4, 0), "taken"),
            ([(3, 0, "done")], (4, 1), "refused"),
            ([(3, 0, "done"), (4, 0, "done")], (3, 1), "dropped"),
            ([(3, 0, "done"), (4, 0, "done")], (4, 1), "taken"),
            ([(3, 0, "done"), (4, 0, "done")], (2, 0), "dropped"),
            # The pending step has an older id than the replay, all later ones a newer.
            ([(3, 0, "ends"), 2], (3, 1), "refused"),
            ([(3, 0, "done"), 2], (3, 1), "refused"),
            ([(3, 0, "done"), 5], (3, 1), "dropped"),
            ([(3, 0, "done"), 5], (4, 0), "dropped"),
            ([(3, 0, "done"), 5], (6, 0), "taken"),
            ([5], (3, 0), "dropped"),
        ],
        ids=str,
    )
    def test_the_next_part(self, story, comes, outcome) -> None:
        replay = InboundReplay()
        for event in story:
            if isinstance(event, int):
                replay.end(event)
                continue
            replay_id, index, fate = event
            earlier = part(replay_id, index, ends=fate == "ends")
            replay.check(earlier)
            replay.begin(earlier)
            if fate != "fails":
                replay.finish(earlier)
        coming = part(*comes)
        assert replay.is_past(coming) == (outcome == "dropped")
        if outcome == "refused":
            with pytest.raises(SessionGap) as caught:
                replay.check(coming)
            assert caught.value.hint
        elif outcome == "taken":
            replay.check(coming)


class TestStepHistory:
    def test_a_step_is_found_as_long_as_its_tokens_stand(self) -> None:
        history = StepHistory()
        plans = [StepPlan((0, 0), (3, 2)), StepPlan((3, 2), (0, 4)), StepPlan((3, 6), (1, 1))]
        for step_id, plan in enumerate(plans):
            history.add(DoneStep(step_id, plan, TIMING))
        assert [done.step_id for done in history.done] == [0, 1, 2]
        history.cut(StepPlan((3, 5), (0, 0)), 3)  # into the tokens of steps 1 and 2
        assert [done.step_id for done in history.done] == [0]
        assert history.find(step(0, (0, 0), (3, 2))).plan is plans[0]
        for repeated in (step(1, (3, 2), (0, 4)), step(0, (0, 0), (2, 3)), step(0, (1, 0), (3, 2))):
            with pytest.raises(SessionGap):
                history.find(repeated)

    def test_a_reorder_is_pending_until_its_step_has_applied_it(self) -> None:
        history = StepHistory()
        history.add(DoneStep(0, StepPlan((0, 0), (3, 2)), TIMING))
        pending = step(1, (3, 2), (1, 1), (1, 0))
        assert history.pending_reorder(pending) == (1, 0)
        history.cut(StepPlan((2, 3), (1, 1), (1, 0)), 1)
        assert history.pending_reorder(pending) is None
        assert history.pending_reorder(step(2, (2, 3), (1, 1), (1, 0))) == (1, 0)
        assert not history.done, "rows have other numbers now"

    @pytest.mark.parametrize("reordered", [False, True])
    def test_a_replay_makes_room_for_the_step_that_follows(self, reordered: bool) -> None:
        history = StepHistory()
        for step_id in range(12):
            history.add(DoneStep(step_id, StepPlan((step_id,), (1,)), TIMING))
        header = RequestHeader(SESSION, 0, 20)
        history.restart(ReplayPart(header, 0, 7, (0,), (1,), reordered=reordered))
        assert (history.last_id, history.done) == (6, ())
        pending = history.pending_reorder(step(7, (7,), (1,), (0,)))
        assert pending == (None if reordered else (0,))

    def test_only_the_last_steps_are_remembered(self) -> None:
        history = StepHistory()
        for step_id in range(KEPT_STEPS + 5):
            history.add(DoneStep(step_id, StepPlan((step_id,), (1,)), TIMING))
        assert [done.step_id for done in history.done] == list(range(5, KEPT_STEPS + 5))

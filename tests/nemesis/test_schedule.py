"""The schedule repeats itself, and leaves nothing out."""

from nemesis.schedule import ON_PROCESSES, PAIRABLE, TWO_AT_ONCE, Phase, Stage, draw

STAGE = Stage(models=(("tiny", 3), ("large", 1)), num_hops=3, faults=ON_PROCESSES)
NUM_PAIRS = (len(ON_PROCESSES) + 1) * len(Phase)


def test_a_scene_follows_from_seed_and_number() -> None:
    assert [draw(STAGE, 7, n) for n in range(20)] == [draw(STAGE, 7, n) for n in range(20)]
    assert [draw(STAGE, 7, n) for n in range(20)] != [draw(STAGE, 8, n) for n in range(20)]


def test_a_round_holds_every_fault_in_every_phase() -> None:
    scenes = [draw(STAGE, 1, number) for number in range(2 * NUM_PAIRS)]
    for round_ in (scenes[:NUM_PAIRS], scenes[NUM_PAIRS:]):
        assert len({(scene.label, scene.phase) for scene in round_}) == NUM_PAIRS
    assert [s.label for s in scenes[:NUM_PAIRS]] != [s.label for s in scenes[NUM_PAIRS:]]


def test_two_at_once_strike_two_hops_in_the_same_step() -> None:
    scenes = [draw(STAGE, 3, number) for number in range(NUM_PAIRS)]
    pairs = [scene.strikes for scene in scenes if scene.label == TWO_AT_ONCE]
    assert len(pairs) == len(Phase)
    for one, other in pairs:
        assert one.hop != other.hop and one.at == other.at
        assert {one.fault, other.fault} <= set(PAIRABLE)

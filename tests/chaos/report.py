"""How scenarios ended, and tables of that. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from chaos.schedule import Scenario

_HEADER = ("fault", "phase", "model", "runs", "failed", "median s", "p95 s", "max s")


@dataclass(slots=True)
class Outcome:
    """How a scenario ended. ``stalls``: per client, its longest gap minus its median gap (s).

    ``landed``: the faults met the phase under way. ``problems`` is empty if all was well.
    """

    scenario: Scenario
    stalls: list[float] = field(default_factory=list)
    landed: bool = False
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def stall_table(outcomes: Iterable[Outcome]) -> str:
    """Stalls by fault and phase, of faults that met their phase; failures of all."""
    groups: dict[tuple[str, str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        scenario = outcome.scenario
        for phase in (str(scenario.phase), "all"):
            groups[scenario.label, phase, scenario.model].append(outcome)
    lines = [_line(_HEADER), _line(["---"] * len(_HEADER))]
    for key, group in sorted(groups.items()):
        stalls = [max(o.stalls) for o in group if o.landed and o.stalls and not o.problems]
        numbers = ["-"] * 3
        if stalls:
            values = (median(stalls), percentile(stalls, 0.95), max(stalls))
            numbers = [f"{value:.2f}" for value in values]
        num_failed = sum(bool(outcome.problems) for outcome in group)
        lines.append(_line([*key, str(len(group)), str(num_failed), *numbers]))
    return "\n".join(lines)


def failure_list(outcomes: Iterable[Outcome]) -> str:
    """Each failed scenario with its schedule and the last line of each problem."""
    lines = []
    for outcome in outcomes:
        if outcome.problems:
            lines.append(f"- {outcome.scenario}")
            lines += [f"  - {problem.strip().splitlines()[-1]}" for problem in outcome.problems]
    return "\n".join(lines) or "None."


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

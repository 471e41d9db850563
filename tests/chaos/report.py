"""Outcomes as tables. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median

from chaos.runner import Outcome

HEADER = ("fault", "phase", "model", "runs", "failed", "median s", "p95 s", "max s")


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def stall_table(outcomes: Iterable[Outcome]) -> str:
    """Stalls by fault and phase, of faults that met their phase; failures of all."""
    groups: dict[tuple[str, str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        scenario = outcome.scenario
        groups[scenario.label, str(scenario.phase), scenario.model].append(outcome)
        groups[scenario.label, "all", scenario.model].append(outcome)
    lines = [_line(HEADER), _line(["---"] * len(HEADER))]
    for key in sorted(groups):
        group = groups[key]
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

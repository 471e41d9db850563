"""What was seen, in Markdown."""

import math
import statistics

from simulation.scenario import HOUR, Scenario
from simulation.tally import Tally


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3f} %" if whole else "-"


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else math.nan


def _spread(values: list[float]) -> str:
    if not values:
        return "not measured: the run was too short"
    return f"{statistics.mean(values):.3f}, {_quantile(values, 0.05):.3f}, {min(values):.3f}"


def describe(scenario: Scenario, tally: Tally, wall_seconds: float) -> str:
    """One scenario in Markdown."""
    hours, num_looks = tally.seconds / HOUR, len(tally.look_seconds)
    moves = "off" if scenario.policy is None else "on"
    rows = [
        ("every block served, share of time", _percent(tally.covered_seconds, tally.seconds)),
        (
            "the same while capacity >= 3 holders a block"
            f" ({_percent(tally.enough_seconds, tally.seconds)} of the time)",
            _percent(tally.covered_enough_seconds, tally.enough_seconds),
        ),
        ("gaps: number, longest", f"{len(tally.gaps)}, {max(tally.gaps, default=0):.0f} s"),
        ("bottleneck / bound, mean, p5, least", _spread(tally.flow)),
        ("best placement found / bound, mean, p5, least", _spread(tally.best_flow)),
        ("bottleneck / best placement found, mean, p5, least", _spread(tally.flow_to_best)),
        ("even shares: bottleneck / bound", _spread(tally.even)),
        ("even shares: best placement found / bound", _spread(tally.best_even)),
        ("even shares: bottleneck / best placement found", _spread(tally.even_to_best)),
        (
            "joins, ends, moves, refused moves",
            f"{tally.joins}, {tally.ends}, {tally.moves}, {tally.refused_moves}",
        ),
        ("moves per server-hour", f"{tally.moves / tally.server_hours:.5f}"),
        ("moves that uncovered a block", str(tally.uncovered_by_moves)),
        (
            "choosing blocks, median / p95",
            f"{1000 * _quantile(tally.place_seconds, 0.5):.1f} /"
            f" {1000 * _quantile(tally.place_seconds, 0.95):.1f} ms",
        ),
        (
            f"a look at moving ({num_looks}), median / p99",
            f"{1000 * _quantile(tally.look_seconds, 0.5):.3f} /"
            f" {1000 * _quantile(tally.look_seconds, 0.99):.3f} ms",
        ),
    ]
    title = (
        f"### {scenario.num_servers} servers, {hours:.0f} h, moves {moves}, seed {scenario.seed}"
    )
    if scenario.shock_at is not None:
        title += f", shock at {scenario.shock_at:g} h"
    lines = [title, "", f"Took {wall_seconds:.0f} s.", "", "| what | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    if scenario.shock_at is not None:
        lines += ["", _after_shock(scenario, tally)]
    if tally.routes:
        lines += ["", *_describe_routes(tally)]
    return "\n".join(lines) + "\n"


def _after_shock(scenario: Scenario, tally: Tally) -> str:
    assert scenario.shock_at is not None
    after = [
        (hour - scenario.shock_at, r) for hour, r in tally.timeline if hour > scenario.shock_at
    ]
    shown = ", ".join(f"{hour:.2f} h: {ratio:.2f}" for hour, ratio in after[:16])
    return f"Bottleneck / bound after the shock: {shown}."


def _describe_routes(tally: Tally) -> list[str]:
    lines = [
        "| what the client knows | KB / minute | route cost / cheapest, median | p95 | hops"
        " | dead hops | no route | finding it, median / p95 ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, routes in tally.routes.items():
        read = tally.directory.get(name)
        num_bytes = f"{statistics.mean(read) / 1000:.0f}" if read else "-"
        num_found = max(1, len(routes.seconds))
        lines.append(
            f"| {name} | {num_bytes} | {_quantile(routes.ratios, 0.5):.2f}"
            f" | {_quantile(routes.ratios, 0.95):.2f} | {routes.num_hops / num_found:.1f}"
            f" | {_percent(routes.num_dead_hops, routes.num_hops)} | {routes.num_missing}"
            f" | {1000 * _quantile(routes.seconds, 0.5):.1f} /"
            f" {1000 * _quantile(routes.seconds, 0.95):.1f} |"
        )
    return lines

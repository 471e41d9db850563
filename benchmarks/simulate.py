"""A swarm of 10 to 10,000 servers that come, go and die, in simulated time and one thread.

    python benchmarks/simulate.py --servers 10000 --hours 24 --out benchmarks/results/<file>.md

What is simulated and how is told in ``simulation/``; how we measure in METHODOLOGY.md.
"""

import argparse
import time
from pathlib import Path

from petals.server.policies import MovePolicy
from simulation import Scenario, run
from simulation.report import describe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers", type=int, nargs="+", default=[10, 30, 100, 1000])
    parser.add_argument("--hours", type=float, default=48.0)
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--churn", type=float, default=0.1, help="per server and hour")
    parser.add_argument("--shock-at", type=float, help="hour")
    parser.add_argument("--no-moves", action="store_true")
    parser.add_argument("--routes", type=int, default=20, help="route samples")
    parser.add_argument("--holders", type=float, default=4.0, help="mean holders of a block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append the report to this file")
    args = parser.parse_args()
    for num_servers in args.servers:
        scenario = Scenario(
            num_servers=num_servers,
            hours=args.hours,
            num_blocks=args.blocks,
            churn_per_hour=args.churn,
            shock_at=args.shock_at,
            policy=None if args.no_moves else MovePolicy(),
            num_route_samples=args.routes,
            holders_worth=args.holders,
            seed=args.seed,
        )
        began = time.perf_counter()
        tally = run(scenario)
        report = describe(scenario, tally, time.perf_counter() - began)
        print(report, flush=True)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(report + "\n")


if __name__ == "__main__":
    main()

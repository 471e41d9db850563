"""``make model-check``: plays many drawn schedules, and says which ones fail."""

import argparse
import sys

from support.simulation.play import play

from .schedules import draw


def main() -> int:
    parser = argparse.ArgumentParser(prog="make model-check", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="number of the first schedule")
    parser.add_argument("--schedules", type=int, default=5000, help="how many are played")
    args = parser.parse_args()
    num_failed = 0
    for number in range(args.first, args.first + args.schedules):
        try:
            play(draw(number))
        except AssertionError as error:
            num_failed += 1
            what, *story = str(error).splitlines()
            print(f"schedule {number} fails: {what}", flush=True)
            if args.schedules == 1:
                print(*story, sep="\n")
    print(f"{args.schedules} schedules from {args.first} on, {num_failed} failed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())

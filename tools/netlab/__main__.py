"""`python -m netlab list | exec LAB HOST COMMAND... | cleanup`."""

import argparse
import os
import sys

from netlab import processes
from netlab.lab import NetLab


def main() -> int:
    parser = argparse.ArgumentParser(prog="netlab", description="Look into running laboratories.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="the running laboratories and their hosts")
    run = verbs.add_parser("exec", help="run a command on a host")
    run.add_argument("lab")
    run.add_argument("host")
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    verbs.add_parser("cleanup", help="remove what crashed runs left behind")
    options = parser.parse_args()
    try:
        return _do(options)
    except (processes.NetLabError, ValueError) as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 1


def _do(options: argparse.Namespace) -> int:
    if options.verb == "list":
        for name, state in processes.labs().items():
            if processes.is_running(state):
                print(name, *NetLab.attach(name).hosts)
    elif options.verb == "exec":
        words = NetLab.attach(options.lab).command(options.host, options.words or ["sh"])
        os.execvp(words[0], words)
    else:
        with processes.registry():
            print("removed:", *processes.remove_dead())
    return 0


if __name__ == "__main__":
    sys.exit(main())

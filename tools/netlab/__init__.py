"""A network laboratory on one Linux machine: hosts that are network namespaces, joined by an
emulated internet with rates, queues, delays, losses, NATs and faults. README.md says how to use it.
"""

from netlab.lab import NetLab
from netlab.processes import NetLabError
from netlab.topology import Host, Topology, real_world

__all__ = ["Host", "NetLab", "NetLabError", "Topology", "real_world"]

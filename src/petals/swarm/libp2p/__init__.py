"""The transport and distributed hash table over hivemind's libp2p daemon.

No type of that engine leaves this folder.
"""

from petals.swarm.libp2p.lean_hivemind import defer_init_modules

defer_init_modules()  # before any module of this folder imports a part of hivemind

"""How a model comes apart: describe it, load a part of it, run that part.

``arch`` looks at a config and says where the blocks are; ``sources`` and ``weights`` find the files
and open only what a part needs; ``split`` builds a server's blocks, ``head`` a client's two ends.
Knows no network, no peer, no session.
"""

"""The names of the services that peers open channels for."""

BLOCKS_SERVICE = "blocks"
"""Sessions and passes of clients."""

RING_SERVICE = "ring"
"""Steps that one server forwards to the next."""

NODE_SERVICE = "node"
"""Questions to any peer, whether or not it serves a model: can it dial us back?"""

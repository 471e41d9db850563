"""The names of the services that peers open channels for."""

BLOCKS_SERVICE = "blocks"
"""Sessions and passes of clients."""

RING_SERVICE = "ring"
"""Steps that one server forwards to the next."""

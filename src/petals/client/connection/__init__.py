"""How a client reaches servers: its event loop, its node and its channels.

Knows no sessions, no routes and no models.
"""

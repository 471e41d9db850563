"""Which servers a session or pass uses: the swarm as this client knows it, and decisions over it.

Sends no steps.
"""

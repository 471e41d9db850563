"""One server's life: placement, loading, announcing, moving, draining.

Knows nothing of single sessions.
"""

"""One server's life: placement, loading, announcing, moving, draining.

Knows no single session's steps.
"""

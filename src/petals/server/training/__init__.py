"""Forward and backward passes on a server, in chunks between decode batches.

Knows no sessions.
"""

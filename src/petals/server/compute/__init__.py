"""Runs jobs on the device: scheduler, batch window, KV memory, and the one thread that owns them.

Knows no peers and no streams.
"""

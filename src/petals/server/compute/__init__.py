"""The compute thread: jobs, scheduling, batches and the key-value pool.

Knows no network.
"""

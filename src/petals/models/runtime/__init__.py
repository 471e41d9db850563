"""Runs loaded blocks over packed rows: batches, attention, key-value layout, recurrent states.

Knows no network and no session.
"""

"""Runs loaded blocks over packed batches: attention, key-value rows, recurrent states, LoRA hooks.

Knows no network and no sessions.
"""

"""Checks that blocks, split and run in packed batches, compute what the whole model computes.

Knows no network.
"""

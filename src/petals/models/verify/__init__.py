"""Checks that split, packed execution equals the plain model.

Knows no network.
"""

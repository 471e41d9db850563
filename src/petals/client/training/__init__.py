"""Whole passes with gradients: batches, micro-batches and one call to one server.

Knows no inference sessions.
"""

"""Loads parts of a model: a server's blocks, a client's head, quantized or not, and what they cost.

Runs no sessions.
"""

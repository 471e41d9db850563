"""Loads a server's blocks or a client's embeddings and head, and computes what they cost.

Runs no sessions.
"""

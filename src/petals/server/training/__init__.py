"""Forward and backward passes of whole sequences, for training and for reading without a session.

Knows no sessions.
"""

"""The directory of signed, expiring records: reading, writing, validating.

Knows no sessions.
"""

"""Sessions on a server: rows, epochs, kept outputs and key-value transfer.

Knows no placement.
"""

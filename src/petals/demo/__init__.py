"""The demo model and data: small published files that make a first run possible offline.

The rest of the package must not depend on it, except `cli` and `testing`.
"""

"""Where a model's files are and what they hold: sources, weights, architecture, conversion.

Runs no model code.
"""

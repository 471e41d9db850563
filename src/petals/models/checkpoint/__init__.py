"""Finds a model's files and describes what they hold: sources, weights, architecture, conversion.

Runs no model code.
"""

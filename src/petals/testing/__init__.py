"""Public test kit: a network in memory, a clock that stands still, small swarms.

Import the parts from their modules; this package imports nothing by itself.
"""

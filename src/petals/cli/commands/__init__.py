"""The subcommands of `petals`, one file each.

A command reads options, calls the library and prints.
"""

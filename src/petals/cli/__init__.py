"""The commands: `petals …`, and run_server / run_dht for scripts of the old Petals.

One file per command. Commands import torch, transformers and the network when they run, so that
`petals --help` is quick. stdout carries data, stderr carries talk.
"""

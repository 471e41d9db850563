"""The transport and distributed hash table over hivemind's libp2p daemon.

No type of that engine leaves this folder.
"""

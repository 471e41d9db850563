"""The server: holds a span of blocks and runs it for clients, many sessions in one batch.

``server`` starts and stops everything, ``lifecycle`` chooses, loads and announces the blocks,
``network`` answers peers, ``admission`` checks and limits what they ask for, ``session`` keeps the
state of each session, ``training`` runs passes, and ``compute`` schedules all of it on the device.
Must not know tokens, sampling or clients' code.
"""

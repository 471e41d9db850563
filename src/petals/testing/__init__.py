"""Public test kit for those who write servers, clients or transports.

- ``in_process_swarm.InProcessSwarm``: real servers and clients in this process, with faults
- ``local_swarm.LocalSwarm``: a bootstrap peer and servers as processes of this machine
- ``memory_net.MemoryNet``: the network in memory below the first of these
- ``manual_clock.ManualClock``: time that moves only when a test moves it
- ``equality.assert_same_tokens``: the swarm's tokens are the local model's
- ``tiny_models.write_tiny_model``: a random checkpoint of any supported architecture

Importing this package imports none of them.
"""

"""A swarm in one event loop with virtual time: real sessions, simulated network and blocks."""

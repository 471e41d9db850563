"""Requests over channels: admission of streams, flow control, heartbeats, dispatch.

Knows no message's meaning.
"""

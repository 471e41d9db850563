"""The server's services: requests from clients and steps forwarded between servers.

Computes nothing itself.
"""

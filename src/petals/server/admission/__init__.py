"""What a server accepts: checks of requests, client limits, adapters, the queue for cache space.

Runs no computation.
"""

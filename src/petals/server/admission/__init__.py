"""What a server accepts: checks of requests, budgets of clients, adapters, the queue for KV memory.

Computes nothing.
"""

"""Who is there: identities, streams between peers, the directory of servers, admission.

Knows peers and bytes; knows nothing of models, sessions or KV caches. Engine types stay inside
``libp2p``.
"""

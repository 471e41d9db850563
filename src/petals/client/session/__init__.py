"""One inference session over a pipeline of hops: its state, its steps, its failover.

Knows rows of hidden states; knows no text and no sampling.
"""

"""Loads and runs parts of a transformers model.

``checkpoint`` finds a model's files and the blocks inside them; ``loading`` builds a server's
blocks or a client's embeddings and head; ``runtime`` runs blocks over packed batches; ``adapters``
reads LoRA adapters; ``verify`` compares loaded parts with the model they came from. Knows no
network, no peers and no sessions.
"""

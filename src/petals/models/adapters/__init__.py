"""LoRA adapters: their config, their files and their low-rank matrices.

Knows no network.
"""

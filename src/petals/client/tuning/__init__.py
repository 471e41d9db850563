"""What a client trains: prompts, LoRA adapters, and the files in which both are saved.

Knows no servers.
"""

"""What a client trains: prompts, LoRA adapters, and the files they are saved in.

Knows no servers.
"""

"""The transformers model around remote blocks: loading, generation, sessions, whole passes.

Uses sessions and passes through their public methods; knows no channels.
"""

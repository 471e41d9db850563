"""The Hugging Face class around remote blocks: loading, generation, caches, whole passes.

Knows sessions and passes through their public methods; knows no channels.
"""

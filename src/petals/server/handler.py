"""The original's import path of the key of ``rpc_info`` under which a server says what is free."""

CACHE_TOKENS_AVAILABLE = "cache_tokens_available"
"""Free KV memory, in tokens of one block."""

__all__ = ["CACHE_TOKENS_AVAILABLE"]

"""LiteCache: a paged, tiered and persistent KV cache for Hugging Face models on Ray."""

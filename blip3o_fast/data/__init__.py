"""Shards of paired embeddings: format, order, loading."""

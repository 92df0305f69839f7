"""Packing images into shards, and indexing shards."""

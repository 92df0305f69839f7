"""Shards of samples: file formats, packing, the index, and reading in an order that knows nothing of workers."""

"""From an index to batches: order, cache, random access, loader."""

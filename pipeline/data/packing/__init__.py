"""From images as they are found to shards and an index."""

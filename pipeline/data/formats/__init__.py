"""File formats: tar shards, images, and statistics of pixels."""

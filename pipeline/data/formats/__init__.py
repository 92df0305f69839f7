"""File formats: tar shards, images, contact sheets, and statistics of pixels."""

"""A gallery: static pages over the images of a generation, read from a bucket or a folder without a server."""

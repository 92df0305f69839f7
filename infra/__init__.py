"""What the pipeline runs on: the local stack, and what is deployed elsewhere."""

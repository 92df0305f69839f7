"""Training: a plain loop, checkpoints in the store, and Ray around it."""

"""Evaluation of generations and models: metrics, the gate, promotion of the champion, and the sampler search."""

"""Distillation: from a teacher, and perhaps a generation of its samples, to the training of a few-step student."""

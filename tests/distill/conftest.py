"""The digits, packed once, and a place for checkpoints, as for trainings."""

from tests.train.conftest import digits, runs

__all__ = ["digits", "runs"]

"""The learning rate as a pure function of the step: a restart needs no scheduler state."""

import math

from pipeline.config.training import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of the step that takes the count of finished steps from `step` to `step + 1`.

    Linear warm-up (Ho et al. 2020, appendix B: 5,000 steps), then constant, or a half cosine or a line to 0 at
    `num_steps`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "none":
        return config.lr
    course = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * course)) if config.decay == "cosine" else 1 - course
    return config.lr * left

"""The pictures of the documentation are drawn by the functions that train and sample, and always the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig
from ddpm_pipeline.diffusion import NoiseSchedule, sample
from ddpm_pipeline.errors import UserError
from docs.figures import digits_net, draw_reverse, draw_schedules, forward_strip, panel, photograph


def test_the_forward_strip_begins_with_the_photograph_and_ends_in_noise() -> None:
    image = photograph(None, size=32)
    strip = forward_strip(image, NoiseSchedule.linear(), seed=0)
    assert strip.shape == (32, 7 * 36 - 4, 3)
    assert np.array_equal(strip[:, :32], image)
    last = strip[:, -32:].astype(float).ravel()
    assert abs(np.corrcoef(last, image.astype(float).ravel())[0, 1]) < 0.1
    assert np.array_equal(strip, forward_strip(image, NoiseSchedule.linear(), seed=0))


def test_the_reverse_process_is_a_strip_and_an_animation(tmp_path: Path) -> None:
    schedule = NoiseSchedule.linear(T=40, beta_end=0.3)
    strip, gif = draw_reverse(lambda x, t: 0.9 * x, schedule, ObjectiveConfig(), (3, 16, 16), 0, tmp_path)
    assert Image.open(strip).size == (8 * 68 - 4, 2 * 68 - 4)
    assert Image.open(gif).n_frames == 41


def test_the_perfect_denoiser_of_digits_draws_digits() -> None:
    schedule = NoiseSchedule.linear()
    sampler = SamplerConfig(kind="dpm++2m", num_steps=20)
    drawn = sample(digits_net(schedule), schedule, sampler, torch.arange(8), (1, 8, 8), seed=0).flatten(1)
    digits = torch.from_numpy(load_digits().data).float() / 8 - 1
    # Blurred by 0.12 in each of 64 pixels: about one away from the digit, where noise would be eight.
    assert float(torch.cdist(drawn, digits).min(1).values.max()) < 2


def test_schedules_are_drawn(tmp_path: Path) -> None:
    assert Image.open(draw_schedules(tmp_path / "schedules.png")).size[0] > 500


def test_tiles_stand_in_rows_on_white() -> None:
    canvas = panel(-torch.ones(3, 1, 2, 2), columns=2, scale=3)
    assert canvas.shape == (16, 16, 3)
    assert canvas[0, 0].tolist() == [0, 0, 0]
    assert canvas[-1, -1].tolist() == [255, 255, 255]


def test_a_picture_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(UserError, match="image"):
        photograph(np.zeros((4, 4), dtype=np.uint8))

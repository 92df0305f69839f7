"""A few images without a cluster."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.generation import SampleConfig
from ddpm_pipeline.generate.preview import draw
from tests.generate.tiny import settings, tiny_card, tiny_model, writer_of


def test_images_and_a_grid_are_drawn_into_a_folder(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    config = SampleConfig(
        model=str(model),
        output=str(tmp_path / "out"),
        count=7,
        first_index=3,
        batch_size=4,
        sampler=SamplerConfig(kind="ddim", num_steps=3),
    )
    seen: list[tuple[int, int]] = []
    result = draw(config, lambda done, total: seen.append((done, total)))
    assert [path.name for path in result.images] == [f"{i:012d}.png" for i in range(3, 10)]
    assert seen == [(k, 6) for k in range(1, 7)]
    with Image.open(result.grid) as picture:
        assert picture.width > 3 * 64
        assert picture.height > 3 * 64


def test_a_drawn_sample_is_the_one_a_generation_makes(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", tiny_card(classes=False))
    sampler = SamplerConfig(kind="ddim", num_steps=3)
    result = draw(SampleConfig(model=str(model), output=str(tmp_path / "out"), count=4, sampler=sampler))
    engine = writer_of(settings(model, f"file://{tmp_path}/big", sampler=sampler)).engine
    made = engine.images(torch.arange(4))
    for path, image in zip(result.images, made, strict=True):
        with Image.open(path) as picture:
            assert np.abs(np.asarray(picture).astype(int) - image[..., 0]).max() <= 1

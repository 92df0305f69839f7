"""The code of docs/diffusion.md runs as it stands, and its pictures are there."""

import re
from pathlib import Path

import torch

TUTORIAL = Path(__file__).parents[2] / "docs" / "diffusion.md"


def test_the_tutorials_loops_train_and_sample() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    generator = torch.Generator().manual_seed(0)
    space: dict[str, object] = {
        "batches": [torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1 for _ in range(3)]
    }
    training, sampling = blocks
    exec(training, space)
    loss = space["loss"]
    assert isinstance(loss, torch.Tensor)
    assert loss.item() > 0
    exec(sampling.replace("range(schedule.T)", "range(0, schedule.T, 100)"), space)
    image = space["image"]
    assert isinstance(image, torch.Tensor)
    assert bool(image.isfinite().all())


def test_the_tutorials_pictures_exist() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", TUTORIAL.read_text())
    assert len(pictures) == 5
    for picture in pictures:
        assert (TUTORIAL.parent / picture).stat().st_size > 1000, picture

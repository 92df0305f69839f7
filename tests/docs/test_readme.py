"""The Python examples of the README run as they are printed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_pipeline.infra.local import LocalStack
from tests.docs.lines import REPOSITORY, fences


def test_the_example_draws_digits_and_finds_one_of_them_again() -> None:
    _, example = fences(REPOSITORY / "README.md", "python")
    assert "assert torch.equal" in example
    space: dict[str, object] = {}
    exec(example, space)
    images, digits = space["images"], space["digits"]
    assert isinstance(images, Tensor)
    assert isinstance(digits, Tensor)
    assert images.shape == (10, 1, 8, 8)
    # Blurred by 0.12 in each of 64 pixels: about one away from a digit, where noise would be eight.
    assert float(torch.cdist(images.flatten(1), digits.float()).min(1).values.max()) < 2


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.timeout(600)
def test_ten_lines_go_from_images_to_samples_that_a_model_draws_again(
    stack: LocalStack, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDPM_ROOT", prefix)
    monkeypatch.chdir(tmp_path)  # where no other stack is
    example, _ = fences(REPOSITORY / "README.md", "python")
    assert sum(bool(line) for line in example.splitlines()) <= 11
    space: dict[str, object] = {}
    exec(example, space)
    drawn = space["drawn"]
    assert isinstance(drawn, np.ndarray)
    assert (drawn.dtype, drawn.shape) == (np.uint8, (10, 8, 8, 1))
    assert space["index"] == 199

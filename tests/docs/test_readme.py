"""The Python example of the README runs as it is printed."""

import torch
from torch import Tensor

from tests.docs.lines import REPOSITORY, fences


def test_the_example_draws_digits_and_finds_one_of_them_again() -> None:
    (example,) = fences(REPOSITORY / "README.md", "python")
    assert "assert torch.equal" in example
    space: dict[str, object] = {}
    exec(example, space)
    images, digits = space["images"], space["digits"]
    assert isinstance(images, Tensor)
    assert isinstance(digits, Tensor)
    assert images.shape == (10, 1, 8, 8)
    # Blurred by 0.12 in each of 64 pixels: about one away from a digit, where noise would be eight.
    assert float(torch.cdist(images.flatten(1), digits.float()).min(1).values.max()) < 2

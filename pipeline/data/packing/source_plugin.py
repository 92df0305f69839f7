"""The door for image sources of other packages; docs/extending.md has an example."""

from typing import Any, Protocol

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.sources import DigitsSource, Source


class OpenSource(Protocol):
    """What a kind of image source does, ours or another package's: a `Source`, which lists the same items in the same
    order wherever it is opened. Items and their bytes follow from the arguments and from what they name. UserError for
    a source that cannot be read, or has no images. settings: of the plug-in's own class (of `digits`, `PackConfig`).
    """

    def __call__(self, config: PackConfig, settings: Any, /) -> Source: ...


def open_digits(config: PackConfig, settings: PackConfig) -> Source:
    """scikit-learn's digits as a kind of source."""
    return DigitsSource()

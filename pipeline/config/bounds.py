"""Bounded types of stored documents: a value out of bounds is refused with its field's name before it is used."""

from typing import Annotated

from pydantic import AfterValidator, Field

MAX_IMAGES = 10**12
"""Images of a generation: keys have twelve digits."""
MAX_SHARDS = 10_000_000
"""Shards of a generation: a job keeps a few bytes per shard in memory."""
MAX_IMAGES_A_SHARD = 1_000_000
MAX_CLASSES = 1_000_000
"""The limit of a network's `num_classes`."""
_MAX_NAME = 256
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
NodeLabels = dict[
    Annotated[str, Field(pattern=rf"^({_LABEL}/)?{_LABEL}$", max_length=317)],
    Annotated[str, Field(pattern=rf"^{_LABEL}$", max_length=63)],
]
"""Labels of Ray's nodes, by name: a name may begin with a domain, as in `ray.io/accelerator-type`."""


def checked_name(text: str) -> str:
    """`text`, if it can be shown on one line. ValueError names the defect."""
    if not 1 <= len(text) <= _MAX_NAME:
        raise ValueError(f"is not of 1 to {_MAX_NAME} characters; rename it")
    return checked_line(text)


def checked_line(text: str) -> str:
    """`text`, if it has no control characters and no surrogates. ValueError otherwise."""
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029" for c in text):
        raise ValueError("holds a line break or another control character; rename it")
    if any(0xD800 <= ord(c) < 0xE000 for c in text):
        raise ValueError("holds a surrogate, which is no character; rename it")
    return text


def local_path(text: str) -> str:
    """The path on this machine that `text` is, or names as file:///path. ValueError for another URI."""
    scheme, is_uri, rest = text.partition("://")
    if not is_uri:
        return text
    if scheme == "file" and rest.startswith("/"):
        return rest
    raise ValueError(
        f"{text} is no path on this machine; write one, such as ./{rest.rstrip('/').split('/')[-1]}"
    )


LocalPath = Annotated[str, AfterValidator(local_path)]
Name = Annotated[str, AfterValidator(checked_name)]
"""A name for people to read: of a class, a model, a host."""
Text = Annotated[str, Field(max_length=10_000)]
"""Free text, such as an error message."""
Key = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(checked_line)]
"""Key of an object."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Label = Annotated[int, Field(ge=0, le=MAX_CLASSES)]
Count = Annotated[int, Field(ge=0, le=MAX_IMAGES)]
"""Number of images, or index of one."""
Bytes = Annotated[int, Field(ge=0, le=2**50)]
"""Size of an object."""
Exact = Annotated[int, Field(ge=0, le=2**100)]
"""A sum over all values of all images."""
Date = Annotated[float, Field(ge=0, le=253_402_300_799)]
"""Seconds since 1970 (UTC), up to the year 9999."""
Seconds = Annotated[float, Field(ge=0, le=1e15)]
"""A duration."""
Number = Annotated[int, Field(ge=0, le=2**31)]
"""A small count."""

"""Several images of one sample (an input and a target, a mask, an embedding): which of them is packed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

from ddpm_pipeline.data.formats.shards import split_name
from ddpm_pipeline.data.packing.source_files import FileName
from ddpm_pipeline.errors import UserError


def select_one_image(
    images: Sequence[FileName], names: Sequence[FileName], wanted: str | None, where: str
) -> list[int]:
    """Numbers of the images to pack: all, or those with the extension `wanted` (`jpg`, `input.jpg`).

    Raises UserError when samples have several images and none was chosen, or none has the wanted extension.
    """
    if wanted == "all":
        return list(range(len(images)))
    if wanted is not None:
        end = f".{wanted.lower().lstrip('.')}"
        chosen = [i for i, name in enumerate(images) if name.path.lower().endswith(end)]
        if not chosen:
            raise UserError(f"image_column: {where} holds no image named …{end}")
        return chosen
    kinds = _kinds_of_samples(images, names)
    if kinds:
        listed = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items())[:10])
        raise UserError(
            f"source: {where}: samples have several images each: {listed}; set image_column to one of these "
            "extensions, or to `all` to make each image a sample"
        )
    return list(range(len(images)))


def _kinds_of_samples(images: Sequence[FileName], names: Sequence[FileName]) -> Counter[str]:
    """How often each extension occurs, if the images belong together as samples do.

    Names that only differ by a number (`v1.0.png`, `v1.1.png`) do not. `a.jpg` and `a.png` do when both
    have a label or caption beside them, or many images come in the same two kinds.
    """
    groups: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name in images:
        split = split_name(name.path)
        if split is not None:
            groups[name.archive, split[0]].append(split[1])
    several = {key: kinds for key, kinds in groups.items() if len(kinds) > 1 and not _counts_on(kinds)}
    if not several:
        return Counter()
    sets = Counter(tuple(sorted(kinds)) for kinds in several.values())
    together = sets.most_common(1)[0][1] > 1
    if not together and not _any_beside(several, names):
        return Counter()
    return Counter(kind for kinds in groups.values() for kind in kinds)


def _counts_on(kinds: list[str]) -> bool:
    """Whether `1.png`, `2.png` are parts of names with a dot in them, rather than kinds of image."""
    return any(part.isdigit() or " " in part for kind in kinds for part in kind.split(".")[:-1])


def _any_beside(several: dict[tuple[str, str], list[str]], names: Sequence[FileName]) -> bool:
    return any(
        name.path.lower().endswith((".cls", ".json", ".txt", ".label"))
        and (name.archive, str(PurePosixPath(name.path).with_suffix(""))) in several
        for name in names
    )

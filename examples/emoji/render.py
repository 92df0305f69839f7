"""Render the emoji of a color font to a folder of images, one subfolder per group: a color data set without a download.

    python examples/emoji/render.py FOLDER [--font FILE] [--list FILE] [--size 72] [--limit N]

On Debian and Ubuntu `apt install fonts-noto-color-emoji unicode-data libfribidi0` installs what this needs. The font is
Noto Color Emoji (SIL Open Font License 1.1), the list is Unicode's emoji-test.txt, whose groups become the classes;
Pillow uses FriBiDi to join characters into one emoji.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
STRIKE = 109
"""The only size of the font's bitmaps, in pixels."""


@dataclass(frozen=True)
class Emoji:
    """One line of the list."""

    number: int
    group: str
    name: str
    text: str
    """The character, or the sequence of characters that the font draws as one."""


def read_list(path: Path) -> Iterator[Emoji]:
    """The fully qualified emoji, in the list's order."""
    group, number = "", 0
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = slug(line.removeprefix("# group: "))
        found = re.match(r"([0-9A-F ]+?) *; fully-qualified +# \S+ E[0-9.]+ (.+)", line)
        if found:
            text = "".join(chr(int(code, 16)) for code in found[1].split())
            yield Emoji(number, group, slug(found[2]), text)
            number += 1


def slug(name: str) -> str:
    """A name as a file name: `Smileys & Emotion` is smileys-emotion."""
    return "-".join(re.findall(r"[^\W_]+", name.lower()))


def draw(text: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image | None:
    """The emoji as RGBA, size x size, on a transparent background; None if the font has no single picture for it."""
    left, top, right, bottom = font.getbbox(text)
    one = font.getlength("\N{GRINNING FACE}")
    if font.getlength(text) > one or right <= left:
        return None
    canvas = Image.new("RGBA", (int(one), int(one)), (0, 0, 0, 0))
    at = ((one - right - left) / 2, (one - bottom - top) / 2)
    ImageDraw.Draw(canvas).text(at, text, font=font, embedded_color=True)
    if canvas.getbbox() is None:
        return None
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def missing(font: Path = FONT, emoji_test: Path = LIST) -> str | None:
    """What has to be installed first; None where nothing is missing."""
    for path, package in ((font, "fonts-noto-color-emoji"), (emoji_test, "unicode-data")):
        if not path.is_file():
            return f"{path} is missing: install {package}, or name another file"
    if not features.check("raqm"):  # Pillow's wheels bring Raqm, which loads FriBiDi from the system
        return "Pillow cannot join characters into one emoji without FriBiDi: install libfribidi0"
    return None


def main() -> None:
    """Write FOLDER/GROUP/NUMBER-NAME.png for each emoji."""
    parser = argparse.ArgumentParser(description="Render the emoji of a color font to a folder of images.")
    parser.add_argument("folder", type=Path, help="is created")
    parser.add_argument("--font", type=Path, default=FONT, help="a font with bitmaps of 109 pixels")
    parser.add_argument("--list", type=Path, default=LIST, help="Unicode's emoji-test.txt")
    parser.add_argument("--size", type=int, default=72, help="height and width of an image")
    parser.add_argument("--limit", type=int, help="at most this many of each group")
    wanted = parser.parse_args()
    if (fault := missing(wanted.font, wanted.list)) is not None:
        sys.exit(f"error: {fault}")
    font = ImageFont.truetype(wanted.font, STRIKE)
    counts: dict[str, int] = {}
    left_out = 0
    for emoji in read_list(wanted.list):
        if wanted.limit is not None and counts.get(emoji.group, 0) >= wanted.limit:
            continue
        image = draw(emoji.text, font, wanted.size)
        if image is None:
            left_out += 1
            continue
        path = wanted.folder / emoji.group / f"{emoji.number:04d}-{emoji.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        counts[emoji.group] = counts.get(emoji.group, 0) + 1
    for group, count in sorted(counts.items()):
        print(f"{count:6,} {group}")
    print(
        f"{sum(counts.values()):6,} images in {wanted.folder}; the font has no picture for {left_out} of the list"
    )


if __name__ == "__main__":
    main()

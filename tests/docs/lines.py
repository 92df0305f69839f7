"""Reading documents: the commands they show, the files they name."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"^ {4,}(\S.*)$", re.M)


@dataclass(frozen=True)
class Shown:
    """A command as a document shows it."""

    document: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}: {' '.join(self.words)}"


def fences(document: Path, *languages: str) -> list[str]:
    """Contents of the fenced blocks in one of these languages."""
    return [text for language, text in _FENCE.findall(document.read_text()) if language in languages]


def command_lines(document: Path) -> list[str]:
    """Lines of fenced shell blocks (and of those without a language) and of indented ones, comments and all."""
    text = document.read_text()
    lines = [line for block in fences(document, "", "console", "sh", "bash") for line in block.splitlines()]
    return lines + _INDENTED.findall(_FENCE.sub("", text))


def shown(document: Path, program: str) -> list[Shown]:
    """Every call of `program` in a document's blocks, also of its path in the virtual environment or behind others."""
    found: list[Shown] = []
    for line in command_lines(document):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # an apostrophe: this line is prose or a listing
        while words and (words[0] == "sudo" or re.fullmatch(r"[A-Z_]+=\S*", words[0])):
            words = words[1:]
        if words and words[0].removeprefix(".venv/bin/") == program:
            found.append(Shown(document.name, tuple(words[1:])))
    return found


def inline(document: Path, program: str) -> list[str]:
    """Calls of `program` inside sentences, as they stand between backquotes."""
    text = _FENCE.sub("", document.read_text())
    return re.findall(rf"`((?:\.venv/bin/)?{program} [^`\n]+)`", text)

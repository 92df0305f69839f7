"""A run logger: a line of text for each point."""

from pathlib import Path

from ddpm_pipeline.tracking.mirror import Mirror, MirroredRun
from tiny_dit.doors import LoggerSettings


class Lines:
    """`name step value`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream = file.open("a")

    def steps(self, name: str) -> set[int]:
        """By the file."""
        words = [line.split() for line in self._file.read_text().splitlines()]
        return {int(step) for one, step, _ in words if one == name}

    def point(self, name: str, step: int, value: float, time_ms: int) -> None:
        """A line."""
        self._stream.write(f"{name} {step} {value}\n")

    def image(self, name: str, step: int, png: bytes, time_ms: int) -> None:
        """Has no place in a file of lines."""

    def flush(self) -> None:
        """To the disk."""
        self._stream.flush()

    def close(self) -> None:
        """The file."""
        self._stream.close()


def open_lines(run: MirroredRun, settings: LoggerSettings) -> Mirror:
    """The entry point's code."""
    return Lines(Path(settings.file))

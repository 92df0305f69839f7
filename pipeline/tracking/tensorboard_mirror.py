"""TensorBoard: each process of a run appends an event file of its own to the run's folder.

Files are written by tensorboardX, which Ray Train needs anyway. It has no reader, and what a run's files hold must be
known to log each step once, so the reader is here: records are length, checksum, event, checksum (TFRecord).
"""

import re
import struct
import uuid
from collections import defaultdict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ddpm_pipeline.config.mirrors import TensorBoardSettings
from ddpm_pipeline.private_files import state_folder
from ddpm_pipeline.tracking.mirror import MirroredRun

_FILES = "*.out.tfevents.*"


class TensorBoardMirror:
    """A run as a folder of event files."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._steps: defaultdict[str, set[int]] = defaultdict(set)
        for event in read_events(folder):
            for value in event.summary.value:
                self._steps[value.tag].add(event.step)
        # Its own name for the file, or a process of the same second would write over it.
        self._writer = EventsWriter(str(folder / "events"), f".{uuid.uuid4().hex[:12]}")

    def steps(self, name: str) -> set[int]:
        """By what the folder's files hold."""
        return self._steps[name]

    def point(self, name: str, step: int, value: float, time_ms: int) -> None:
        """As a scalar."""
        self._write(step, time_ms, {"tag": name, "simple_value": value})

    def image(self, name: str, step: int, png: bytes, time_ms: int) -> None:
        """As an image summary."""
        _, summary = _messages()
        width, height = Image.open(BytesIO(png)).size
        image = summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._write(step, time_ms, {"tag": name, "image": image})

    def flush(self) -> None:
        """To the disk."""
        self._writer.flush()

    def close(self) -> None:
        """The file."""
        self._writer.close()

    def _write(self, step: int, time_ms: int, value: dict[str, Any]) -> None:
        event, summary = _messages()
        content = summary(value=[summary.Value(**value)])
        self._writer.write_event(event(wall_time=time_ms / 1000, step=step, summary=content))


def open_tensorboard(run: MirroredRun, settings: TensorBoardSettings) -> TensorBoardMirror:
    """The mirror in the folder of this run."""
    return TensorBoardMirror(run_folder(run, settings))


def run_folder(run: MirroredRun, settings: TensorBoardSettings) -> Path:
    """Where the event files of a run are, the same for all its processes on a machine."""
    root = Path(settings.folder).expanduser() if settings.folder else state_folder("tensorboard")
    return root / f"{re.sub(r'[^A-Za-z0-9._-]', '_', run.name)[:80] or 'run'}-{run.run_id[:12]}"


def read_events(folder: Path) -> Iterator[Any]:
    """Every whole event in the files of a folder, in order of their names; a file ends at the first torn record."""
    event, _ = _messages()
    for file in sorted(folder.glob(_FILES)):
        for data in _records(file):
            yield event.FromString(data)


def _messages() -> tuple[Any, Any]:
    """Protocol buffers' classes of an event and of a summary, which have no types."""
    from tensorboardX.proto import event_pb2, summary_pb2

    return vars(event_pb2)["Event"], vars(summary_pb2)["Summary"]


def _records(file: Path) -> Iterator[bytes]:
    from tensorboardX.record_writer import masked_crc32c

    with file.open("rb") as stream:
        while len(header := stream.read(12)) == 12:
            (size,) = struct.unpack("<Q", header[:8])
            data = stream.read(size) if size < 1 << 30 else b""
            (checksum,) = struct.unpack("<I", stream.read(4).ljust(4, b"\0"))
            if len(data) < size or masked_crc32c(data) != checksum:
                return
            yield data

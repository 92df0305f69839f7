"""The door for run loggers: what MLflow is told, told to others too. docs/extending.md has an example.

A mirror is fed from the spool, behind the training's back: what it takes long for, or cannot do, delays nothing.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ddpm_pipeline.config.plugins import require_plugin
from ddpm_pipeline.config.tracking import MirrorConfig
from ddpm_pipeline.private_files import read_private
from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.tracking.journal import Journal
from ddpm_pipeline.tracking.sender import MAX_FILE_BYTES, encode_image
from ddpm_pipeline.tracking.spool_records import ImageRecord, PointRecord, Record

log = logging.getLogger(__name__)
_BATCH_RECORDS = 1000


@dataclass(frozen=True)
class MirroredRun:
    """The run of MLflow that is mirrored."""

    run_id: str
    name: str
    """For people; several runs may have it."""


class Mirror(Protocol):
    """A run in another logger. Used by one thread at a time; any method may raise: the batch is then repeated."""

    def steps(self, name: str) -> set[int]:
        """Steps of this metric or image that the logger has of this run, also from processes that were killed: they are
        not given again.
        """
        ...

    def point(self, name: str, step: int, value: float, time_ms: int) -> None:
        """A value, NaN and infinity included. time_ms: Unix time in milliseconds."""
        ...

    def image(self, name: str, step: int, png: bytes, time_ms: int) -> None:
        """An image, named `images/…`. A logger without images ignores it."""
        ...

    def flush(self) -> None:
        """Returns once all that was given survives this process."""
        ...

    def close(self) -> None:
        """Nothing is given afterwards."""
        ...


class OpenMirror(Protocol):
    """What a run logger's entry point does: opens the mirror of a run, a new one or one that exists.

    settings: of the plug-in's own class.
    """

    def __call__(self, run: MirroredRun, settings: Any, /) -> Mirror: ...


class MirrorFeed:
    """Hands a journal's points and images to one mirror, each once, however often the process dies in between.

    An offset of its own says how far it has come; what a mirror has beyond it, the mirror itself says.
    """

    def __init__(self, journal: Journal, config: MirrorConfig, run: MirroredRun) -> None:
        self._journal, self._config, self._run = journal, config, run
        self._part = re.sub(r"[^A-Za-z0-9]", "-", config.kind)
        self._mirror: Mirror | None = None
        self._steps: dict[str, set[int]] = {}
        self._offset: int | None = None
        self._told = ""
        journal.follow(self._part)

    def deliver(self) -> bool:
        """Hand over what is new; False after a failure, which is logged, and tried again at the next call."""
        try:
            self._deliver()
        except Exception as error:  # noqa: BLE001 - a mirror's, which must not end the delivery to MLflow
            reason = f"{type(error).__name__}: {' '.join(redact(str(error)).split())[:300]}"
            if reason != self._told:
                log.warning("run %s: %s gets nothing now (%s)", self._run.run_id, self._config.kind, reason)
            self._told = reason
            self.close()
            return False
        self._told = ""
        return True

    def forget_offset(self) -> None:
        """Begin where the disk says, the next time: another process may have delivered in between."""
        self._offset = None
        self._steps.clear()

    def close(self) -> None:
        """End the mirror; the next delivery opens it again."""
        mirror, self._mirror = self._mirror, None
        self.forget_offset()
        try:
            if mirror is not None:
                mirror.close()
        except Exception as error:  # noqa: BLE001 - as above
            log.warning("run %s: closing %s failed: %s", self._run.run_id, self._config.kind, error)

    def _deliver(self) -> None:
        if self._offset is None:
            self._offset = self._journal.offset(self._part)
        while entries := self._journal.read(self._offset, _BATCH_RECORDS):
            mirror = self._mirror or self._open()
            for entry in entries:
                self._take(mirror, entry.record)
            mirror.flush()
            self._offset = entries[-1].end
            self._journal.save_offset(self._offset, self._part)

    def _open(self) -> Mirror:
        open_mirror: OpenMirror = require_plugin(self._config, "track.mirrors").plugin.load()
        self._mirror = open_mirror(self._run, self._config.options)
        return self._mirror

    def _take(self, mirror: Mirror, record: Record | None) -> None:
        if isinstance(record, PointRecord):
            for name, value in record.m.items():
                if self._is_new(mirror, name, record.s):
                    mirror.point(name, record.s, value, record.t)
        elif isinstance(record, ImageRecord):
            file = self._journal.files / record.f
            if file.exists() and self._is_new(mirror, f"images/{record.i}", record.s):
                png = encode_image(read_private(file, MAX_FILE_BYTES), record.f)[0]
                mirror.image(f"images/{record.i}", record.s, png, record.t)

    def _is_new(self, mirror: Mirror, name: str, step: int) -> bool:
        """Whether this is the first time that the mirror is given this step."""
        if name not in self._steps:
            self._steps[name] = set(mirror.steps(name))
        if step in self._steps[name]:
            return False
        self._steps[name].add(step)
        return True


def feeds_of(journal: Journal, mirrors: Sequence[MirrorConfig], run: MirroredRun) -> list[MirrorFeed]:
    """A feed for each mirror."""
    return [MirrorFeed(journal, config, run) for config in mirrors]

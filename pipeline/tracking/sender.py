"""The spool's remote half: delivers journal records to the server, each exactly once.

Exactly-once delivery rests on two facts. MLflow identifies a point by (metric, timestamp, step, value), and the journal
fixes the timestamp, so the same record sent twice is one point. And before a metric is first sent, the steps that the
run already has of it are fetched: an existing step (written before a resume, by another process, with another
timestamp) is not sent again. The first value wins.
"""

import io
import json
import logging
import re
import tempfile
import time
import uuid
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_pipeline.private_files import read_private
from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.tracking.connect import is_denied, is_outage
from ddpm_pipeline.tracking.direct_artifacts import direct_artifacts
from ddpm_pipeline.tracking.journal import Journal, JournalEntry
from ddpm_pipeline.tracking.run import HEARTBEAT_TAG, reopen_if_closed_as_stale
from ddpm_pipeline.tracking.spool_records import ArtifactRecord, ImageRecord, PointRecord, Record, TagsRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

MAX_POINTS = 1000  # the server's limit for one batch
MAX_FILE_BYTES = 1 << 30
_PREVIEW_PIXELS = 256
_IMAGE_NAME = re.compile(r"(?:^|/)(?P<key>[^/+%]+)[+%]step[+%](?P<step>-?\d+)[+%]timestamp[+%].*\.png$")
_TEXT_SUFFIXES = frozenset(
    {".yaml", ".yml", ".json", ".txt", ".md", ".html", ".csv", ".toml", ".log", ".svg"}
)


class Sender:
    """Delivers one journal to one run. Used by one thread at a time."""

    def __init__(self, journal: Journal, client: "MlflowClient", run_id: str) -> None:
        self._journal = journal
        self._client = client
        self._run_id = run_id
        self._steps: dict[str, set[int]] = {}
        self._images: set[tuple[str, int]] | None = None
        self._shows_images = False
        self._offset: int | None = None
        self._refused: set[str] = set()
        self.delivered = 0
        """Points and files that this object sent."""
        self.damaged = 0
        """Damaged lines, which cannot be sent."""
        self.refused = 0
        """Records that the server rejected, kept in refused.jsonl."""

    def send_next(self) -> bool:
        """Deliver the next records; False when there are none. Raises during an outage; nothing is lost then."""
        if self._offset is None:
            self._offset = self._journal.offset()
        entries = _next_batch(self._journal.read(self._offset, MAX_POINTS))
        if not entries:
            return False
        try:
            self._deliver(entries)
        except Exception:
            # It is unknown what the server has of an unanswered request: fetch the steps again before sending more.
            self._steps.clear()
            self._images = None
            raise
        self._offset = entries[-1].end
        self._journal.save_offset(self._offset)
        self.damaged += sum(entry.is_damaged for entry in entries)
        for entry in entries:
            name = _file_of(entry.record)
            if name is not None and name not in self._refused:
                (self._journal.files / name).unlink(missing_ok=True)
        return True

    def send_heartbeat(self) -> None:
        """Update the heartbeat of this run, and reopen it if it was closed as stale."""
        self._client.set_tag(self._run_id, HEARTBEAT_TAG, str(time.time()))
        reopen_if_closed_as_stale(self._client, self._run_id)

    def forget_offset(self) -> None:
        """Read the offset from the disk next time: another process may have delivered in between."""
        self._offset = None

    def _deliver(self, entries: list[JournalEntry]) -> None:
        try:
            self._send([entry.record for entry in entries])
        except Exception as error:
            if is_outage(error) or is_denied(error) or not self._run_is_active():
                raise
            self._deliver_one_by_one(entries)

    def _deliver_one_by_one(self, entries: list[JournalEntry]) -> None:
        """A batch was rejected: find the records that the server rejects, and dead-letter only those."""
        for entry in entries:
            try:
                self._send([entry.record])
            except Exception as error:
                if is_outage(error) or is_denied(error):
                    raise
                reason = redact(str(error)).splitlines()[0][:300]
                log.warning(
                    "run %s: MLflow rejects a record, kept in refused.jsonl: %s", self._run_id, reason
                )
                self._journal.dead_letter(json.loads(entry.line), reason)
                self.refused += 1
                self._refused.add(_file_of(entry.record) or "")

    def _run_is_active(self) -> bool:
        """Whether rejections are about the record; a deleted run may be restored, so its points wait."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(self._run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.get_http_status_code() == 404:
                return False
            raise

    def _send(self, records: list[Record | None]) -> None:
        """Send one batch from `_next_batch`: a file, or points and tags."""
        if isinstance(records[0], (ImageRecord, ArtifactRecord)):
            self._send_file(records[0])
        else:
            self._send_points([record for record in records if isinstance(record, PointRecord)])
            self._send_tags(record for record in records if isinstance(record, TagsRecord))

    def _send_points(self, records: Sequence[PointRecord]) -> None:
        from mlflow.entities import Metric

        self._fetch_steps({name for record in records for name in record.m})
        new: list[Metric] = []
        taken: set[tuple[str, int]] = set()
        for record in records:
            for name, value in record.m.items():
                point = (name, record.s)
                if point not in taken and record.s not in self._steps[name]:
                    taken.add(point)
                    new.append(Metric(name, value, record.t, record.s))
        for start in range(0, len(new), MAX_POINTS):
            self._client.log_batch(self._run_id, metrics=new[start : start + MAX_POINTS])
        for name, step in taken:
            self._steps[name].add(step)
        self.delivered += len(new)

    def _send_tags(self, records: Iterable[TagsRecord]) -> None:
        from mlflow.entities import RunTag

        tags = {name: value for record in records for name, value in record.g.items()}
        if tags:
            self._client.log_batch(self._run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def _fetch_steps(self, names: Set[str]) -> None:
        """The steps that the run has of these metrics: fetched once, then cached (some 60 bytes per point).

        The run itself says which metrics have any: a new run takes one request, and not one for each metric.
        """
        unknown = sorted(names - self._steps.keys())
        logged = self._client.get_run(self._run_id).data.metrics if unknown else {}
        for name in unknown:
            history = self._client.get_metric_history(self._run_id, name) if name in logged else ()
            self._steps[name] = {point.step for point in history}

    def _send_file(self, record: ImageRecord | ArtifactRecord) -> None:
        local = self._journal.files / record.f
        try:
            data = read_private(local, MAX_FILE_BYTES)
        except FileNotFoundError:
            log.warning("run %s: %s is missing; its record is skipped", self._run_id, local)
            return
        if isinstance(record, ImageRecord):
            self._send_image(record, data)
        else:
            self._send_artifact(record.p, data)
        self.delivered += 1

    def _send_artifact(self, path: str, data: bytes) -> None:
        if Path(path).suffix.lower() in _TEXT_SUFFIXES:
            data = redact(data.decode("utf-8", errors="surrogateescape")).encode(
                "utf-8", errors="surrogateescape"
            )
        self._upload({Path(path).name: data}, str(Path(path).parent))

    def _send_image(self, record: ImageRecord, data: bytes) -> None:
        """Write the two files from which the run page makes an image with a step slider.

        MLflow's `log_image` uses random names; here the name follows from the record, so that a second delivery
        replaces the first. The preview goes first: an existing PNG proves that both exist.
        """
        key, step = record.i.replace("/", "~"), record.s
        if (key, step) in self._known_images():
            return
        unique = uuid.uuid5(uuid.NAMESPACE_URL, f"{self._run_id}/{key}/{step}")
        stem = f"{key}+step+{step}+timestamp+{record.t}+{unique}"
        png, preview = encode_image(data, record.f)
        self._upload({f"{stem}+compressed.webp": preview, f"{stem}.png": png}, "images")
        if not self._shows_images:
            self._client.set_tag(self._run_id, "mlflow.loggedImages", "True")
            self._shows_images = True
        self._known_images().add((key, step))

    def _known_images(self) -> set[tuple[str, int]]:
        if self._images is None:
            with direct_artifacts(self._place):
                listed = self._client.list_artifacts(self._run_id, "images")
            found = (_IMAGE_NAME.search(file.path) for file in listed)
            self._images = {(m["key"], int(m["step"])) for m in found if m and "+compressed" not in m[0]}
        return self._images

    def _upload(self, files: dict[str, bytes], parent: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                local = Path(folder) / name
                local.write_bytes(data)
                with direct_artifacts(self._place):
                    self._client.log_artifact(self._run_id, str(local), None if parent == "." else parent)

    def _place(self) -> str:
        return str(self._client.get_run(self._run_id).info.artifact_uri)


def _next_batch(entries: list[JournalEntry]) -> list[JournalEntry]:
    """The longest prefix that fits one call: one file, or records of at most MAX_POINTS points in total."""
    count = 0
    for i, entry in enumerate(entries):
        count += len(entry.record.m) if isinstance(entry.record, PointRecord) else 0
        if _file_of(entry.record) is not None or count > MAX_POINTS:
            return entries[: max(i, 1)]
    return entries


def _file_of(record: Record | None) -> str | None:
    """The spool file of a record, if it has one."""
    return record.f if isinstance(record, (ImageRecord, ArtifactRecord)) else None


def encode_image(data: bytes, name: str) -> tuple[bytes, bytes]:
    """(PNG, small WebP preview) of a stored image: a PNG, or a raw uint8 array as .npy."""
    from PIL import Image

    from ddpm_pipeline.data.formats.npy import decode_npy

    if name.endswith(".npy"):
        image = Image.fromarray(decode_npy(data))
        out = io.BytesIO()
        image.save(out, "PNG")
        data = out.getvalue()
    else:
        image = Image.open(io.BytesIO(data))
    scale = _PREVIEW_PIXELS / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    preview = io.BytesIO()
    image.convert("RGB").resize(size).save(preview, "WEBP")
    return data, preview.getvalue()

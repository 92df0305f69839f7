"""Metrics that never hold up training: written to a local file at once, delivered to MLflow by a thread.

A call costs about a tenth of a millisecond and never waits for the network, never raises, and survives the
death of the process; outages of any length are bridged by the file. See `journal` for what survives what,
`sender` for why nothing arrives twice.
"""

import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_pipeline.config.tracking import MirrorConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.private_files import private_folder, require_own, state_folder
from ddpm_pipeline.retry import RetryPolicy, call_with_retries
from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.tracking.connect import brief, is_denied, is_outage, tracking_client, tracking_uri
from ddpm_pipeline.tracking.journal import Journal, SpoolIdentity, read_identity, write_identity
from ddpm_pipeline.tracking.mirror import MirroredRun, feeds_of
from ddpm_pipeline.tracking.sender import Sender
from ddpm_pipeline.tracking.spool_records import MAX_NAME, MAX_TAG, RUN_ID, parse_point

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)
SPOOL_VARIABLE = "DDPM_SPOOL"
_ILLEGAL_IN_NAME = re.compile(r"[^\w\-./ :]")
_ILLEGAL_IN_IMAGE_KEY = re.compile(r"[^a-zA-Z0-9_\-./ ]")
DELIVERY_POLICY = RetryPolicy(attempts=None, first_pause_seconds=1.0, longest_pause_seconds=15.0)
"""While MLflow is away."""


class Spool:
    """Points, images and artifacts of one run from one process.

    Calls never wait for MLflow and never raise. A later Spool on the same directory, or `replay`, delivers what an
    earlier one could not. The first value of a (metric, step) wins, so a resumed training may log repeated steps again.
    NaN is stored as NaN, infinities as the largest float64 (MLflow's rule). Log means over windows, not every step.
    """

    def __init__(
        self,
        directory: Path,
        uri: str | None,
        run_id: str,
        *,
        send_interval_seconds: float = 2.0,
        heartbeat_seconds: float = 60.0,
        name: str = "",
        mirrors: Sequence[MirrorConfig] = (),
    ) -> None:
        """`name`: of the run, for the `mirrors`, which get the points and images too."""
        self.run_id = run_id
        self.directory = directory
        address = tracking_uri(uri)
        self._journal = Journal(directory)  # first: an open journal keeps the directory from being removed
        try:
            write_identity(directory, run_id, address, name, mirrors)
        except BaseException:
            self._journal.close()
            raise
        self._sender = Sender(self._journal, tracking_client(address), run_id)
        self._feeds = feeds_of(self._journal, mirrors, MirroredRun(run_id, name))
        self._interval = send_interval_seconds
        self._heartbeat = heartbeat_seconds
        self._next_heartbeat = 0.0
        self._names: dict[str, str] = {}
        self._closing = threading.Event()
        self._deadline = math.inf
        self._thread = threading.Thread(target=self._deliver_until_closed, name="metric-spool", daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of this step. Characters that MLflow forbids in a name become `_`, with a warning."""
        try:
            clean = {self._name(name): float(value) for name, value in values.items()}
            self._journal.append({"t": time.time_ns() // 1_000_000, "s": int(step), "m": clean})
        except Exception:
            self._journal.lost += 1
            log.exception("metrics of step %s could not be stored", step)

    def image(self, key: str, step: int, image: "bytes | np.ndarray[Any, Any]") -> None:
        """Log an image for the run page's step slider: PNG bytes, or uint8 (H, W), (H, W, 1) or (H, W, 3)."""
        try:
            data, suffix = (image, ".png") if isinstance(image, bytes) else (_as_npy(image), ".npy")
            name = self._journal.put_file(data, suffix)
            key = _ILLEGAL_IN_IMAGE_KEY.sub("_", key)[:MAX_NAME] or "unnamed"
            self._journal.append({"t": time.time_ns() // 1_000_000, "s": int(step), "i": key, "f": name})
        except Exception:
            self._journal.lost += 1
            log.exception("image %s of step %s could not be stored", key, step)

    def artifact(self, path_in_run: str, data: bytes) -> None:
        """Log a file as an artifact of the run; a later one at the same path replaces it."""
        try:
            name = self._journal.put_file(data, ".bin")
            self._journal.append({"t": time.time_ns() // 1_000_000, "p": path_in_run, "f": name})
        except Exception:
            self._journal.lost += 1
            log.exception("artifact %s could not be stored", path_in_run)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; a later value replaces an earlier one."""
        try:
            clean = {self._name(name): redact(value)[:MAX_TAG] for name, value in tags.items()}
            self._journal.append({"t": time.time_ns() // 1_000_000, "g": clean})
        except Exception:
            self._journal.lost += 1
            log.exception("tags %s could not be stored", ", ".join(tags))

    def undelivered(self) -> bytes:
        """Undelivered point records, for a checkpoint, so that they survive the loss of this machine."""
        return self._journal.undelivered_lines()

    def restore(self, records: bytes) -> None:
        """Add points that another machine's spool of this run could not deliver (from `undelivered`).

        Lines that are not points are skipped, and counted in a warning.
        """
        skipped, reason = 0, ""
        for line in records.split(b"\n"):
            try:
                if line:
                    parse_point(line)
                    self._journal.append(json.loads(line))
            except ValueError as error:
                skipped, reason = skipped + 1, reason or str(error)
        if skipped:
            log.warning("run %s: %d lines of the checkpoint are not points: %s", self.run_id, skipped, reason)

    def close(self, timeout_seconds: float = 60.0) -> int:
        """Deliver the rest for at most this long; returns how many points and files remain."""
        self._deadline = time.monotonic() + timeout_seconds
        self._closing.set()
        self._thread.join(timeout_seconds + 1.0)
        self._journal.sync()
        left = self._journal.undelivered()
        if left:
            log.warning("%d points remain in %s; deliver them with `ddpm replay`", left, self.directory)
        return left

    @property
    def lost(self) -> int:
        """Records that were dropped (disk full for long, or a value that is not a number)."""
        return self._journal.lost

    def _name(self, name: str) -> str:
        known = self._names.get(name)
        if known is None:
            known = self._names[name] = _ILLEGAL_IN_NAME.sub("_", name).strip("/.")[:MAX_NAME] or "unnamed"
            if known != name:
                log.warning("metric name %r is not allowed by MLflow; stored as %r", name, known)
        return known

    def _deliver_until_closed(self) -> None:
        failures = 0
        while True:
            self._wait(failures)
            closing = (
                self._closing.is_set()
            )  # read before the round, which then sees all that came before close()
            failures = 0 if self._deliver_all() else failures + 1
            if closing and (failures == 0 or time.monotonic() >= self._deadline):
                for feed in self._feeds:
                    feed.close()
                self._journal.release()
                return

    def _wait(self, failures: int) -> None:
        """Pause before a round: the interval; longer after failures in a row; short once closing."""
        pause = self._interval if failures == 0 else DELIVERY_POLICY.pause_seconds(failures)
        if not self._closing.wait(pause) or failures == 0:
            return
        time.sleep(max(0.0, min(pause, 1.0, self._deadline - time.monotonic())))

    def _deliver_all(self) -> bool:
        """Send everything; False if that failed."""
        try:
            self._journal.sync()
            if not self._journal.claim():
                for follower in (self._sender, *self._feeds):
                    follower.forget_offset()
                return True  # another process delivers this directory; if it dies, this one takes over
            for feed in self._feeds:  # first: MLflow's files are removed once it has them
                feed.deliver()
            while self._sender.send_next() and time.monotonic() < self._deadline:
                pass
            if time.monotonic() >= self._next_heartbeat:
                self._sender.send_heartbeat()
                self._next_heartbeat = time.monotonic() + self._heartbeat
        except Exception as error:
            if is_outage(error) or is_denied(error):
                log.warning("run %s: %s; points stay in %s", self.run_id, _state(error), self.directory)
            else:
                log.exception("run %s: delivery failed; points stay in %s", self.run_id, self.directory)
            return False
        return True


def _state(error: Exception) -> str:
    """Of what takes the points, or the artifacts beside them, and did not."""
    if isinstance(error, UserError):
        return str(error)
    return "MLflow denies access" if is_denied(error) else f"a delivery to MLflow failed ({brief(error)})"


def spool_folder() -> Path:
    """This user's folder of spools on this machine: $DDPM_SPOOL, else in the state folder.

    UserError when another user may have written to it.
    """
    chosen = os.environ.get(SPOOL_VARIABLE)
    return private_folder(Path(chosen).expanduser()) if chosen else state_folder("spool")


def spool_of(run_id: str, part: str = "") -> Path:
    """The spool of a run, or of a part of it, in `spool_folder`. UserError for an id that MLflow never assigns."""
    if not re.fullmatch(RUN_ID, run_id):
        raise UserError(
            f"MLflow names a run {run_id[:100]!r}: not a run id; is MLFLOW_TRACKING_URI an MLflow server?"
        )
    return spool_folder() / (f"{run_id}-{part}" if part else run_id)


@dataclass(frozen=True)
class Replayed:
    """What the replay of one spool did not deliver."""

    waiting: int = 0
    """Points and files left for another replay."""
    damaged: int = 0
    """Damaged lines, which cannot be delivered."""
    refused: int = 0
    """Records that the server rejects; they stay in refused.jsonl."""
    problem: str = ""
    """Why nothing was attempted, in one line."""

    @property
    def complete(self) -> bool:
        """Whether MLflow has everything of the spool."""
        return self == Replayed()


class SpoolInUseError(UserError):
    """A running process is delivering this spool."""


def replay(directory: Path, timeout_seconds: float = 60.0, uri: str | None = None) -> Replayed:
    """Deliver what an ended process left in `directory`; returns what could not be delivered.

    The points go to the server at `uri`, or MLFLOW_TRACKING_URI, and to no other, whatever the spool names.
    UserError when the directory is not a spool or the server has no such run; SpoolInUseError when another running
    process delivers it.
    """
    identity = read_identity(directory)
    if identity is None:
        raise UserError(f"{directory}: not a spool (run.json is missing); name a run's spool directory")
    address = tracking_uri(uri)
    with closing(Journal(directory)) as journal:
        if not journal.claim():
            raise SpoolInUseError(f"{directory}: a running process is delivering it; wait for it or end it")
        sender = Sender(journal, tracking_client(address), identity.run_id)
        for feed in feeds_of(journal, identity.mirrors, MirroredRun(identity.run_id, identity.name)):
            feed.deliver()
            feed.close()
        try:
            _send_all(sender, timeout_seconds)
        except UserError:
            raise
        except Exception as error:
            raise UserError(_not_taken(directory, identity, address, error)) from error
        return Replayed(journal.undelivered(), sender.damaged, sender.refused)


def _not_taken(directory: Path, identity: SpoolIdentity, address: str, error: Exception) -> str:
    """One line for points that a reachable server rejects."""
    opened = redact(identity.tracking_uri.rstrip("/"))
    remedy = "" if opened == address else f"; the run was opened at {opened}: set MLFLOW_TRACKING_URI to it"
    return f"{directory}: MLflow at {address} rejects run {identity.run_id} ({brief(error)}){remedy}"


def _send_all(sender: Sender, timeout_seconds: float) -> None:
    """Send until nothing is left or time is up; retries during an outage."""
    deadline = time.monotonic() + timeout_seconds
    while (left := deadline - time.monotonic()) > 0:
        policy = replace(DELIVERY_POLICY, total_seconds=left)
        try:
            if not call_with_retries(sender.send_next, is_outage, policy):
                return
        except Exception as error:
            if not is_outage(error):
                raise
            return  # what is left waits for another replay


def replay_all(root: Path, timeout_seconds: float = 60.0, uri: str | None = None) -> dict[Path, Replayed]:
    """Replay every spool below `root`; what each did not deliver (see `replay`), by directory.

    Spools that running processes deliver are skipped, with a log line.
    """
    found: dict[Path, Replayed] = {}
    address = tracking_uri(uri)
    if root.exists():
        require_own(root)
    deadline = time.monotonic() + timeout_seconds
    for directory in sorted(p.parent for p in root.glob("*/run.json")):
        try:
            found[directory] = replay(directory, max(0.0, deadline - time.monotonic()), address)
        except SpoolInUseError as busy:
            log.warning("%s", busy)
        except UserError as error:
            found[directory] = Replayed(problem=str(error))
    return found


def _as_npy(image: "np.ndarray[Any, Any]") -> bytes:
    import numpy as np

    from ddpm_pipeline.data.formats.npy import encode_npy

    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(
            f"image: expected uint8 of shape (H, W) or (H, W, C), got {image.dtype} {image.shape}"
        )
    pixels = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
    return encode_npy(pixels)

"""Checkpoints in the store: written in the background, and either complete or absent.

    checkpoints/000000001000/state.safetensors     every tensor of the training state
    checkpoints/000000001000/record.json           last: step, size and sha256 of the state, what it belongs to

A checkpoint without its record is unfinished; one whose bytes do not match the record is damaged. Both are skipped
for the previous one, with a warning. If there are checkpoints and none is valid, a training fails rather than start
again at step 0.
"""

import hashlib
import json
import logging
import math
import re
import tempfile
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import Bytes, Name, Sha256
from ddpm_pipeline.config.device_kind import DeviceKind, Matmul
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.disk_errors import disk_errors_at
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.store import ObjectMissing, Store, retry_during_outage
from ddpm_pipeline.train.host_copies import Staged, Staging

log = logging.getLogger(__name__)

FOLDER = "checkpoints/"
STATE, RECORD = "state.safetensors", "record.json"
MIN_KEPT = 2
"""Kept during a training, whatever the settings say: a starting group may be reading the previous one."""
MAX_LISTINGS, LISTING_PAUSE_SECONDS = 5, 2.0
_RECORD_KEY = re.compile(rf"{FOLDER}([0-9]{{12}})/{re.escape(RECORD)}")


class TrainingDevice(Settings):
    """What the weights were computed on. Another device, or one used otherwise, rounds otherwise."""

    kind: DeviceKind
    """Of every worker's GPU in the steps since the checkpoint before."""
    matmul: Matmul
    deterministic: bool
    """Whether all steps so far used deterministic algorithms: once some did not, no later step makes up for it."""

    def __str__(self) -> str:
        return str(self.kind)


class Record(Settings):
    """The proof beside a finished checkpoint."""

    step: int = Field(ge=0, lt=10**12)
    """Finished optimizer steps; the next one takes positions from step * global_batch on."""
    sha256: Sha256
    """Of state.safetensors."""
    size_bytes: Bytes
    """Of state.safetensors."""
    identity: Name
    """Digest of the training that it belongs to."""
    eval_loss: float | None = None
    """eval/loss of its averaged weights; None if not measured, or not finite."""
    device: TrainingDevice | None = None
    """The GPU of the workers; None = they used the CPU."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, read and verified."""

    record: Record
    tensors: dict[str, Tensor]


def save_checkpoint(
    store: Store,
    step: int,
    tensors: Mapping[str, Tensor],
    identity: str,
    eval_loss: float | None = None,
    device: TrainingDevice | None = None,
) -> Record:
    """Write a checkpoint: the state first, its record last."""
    with (
        disk_errors_at(tempfile.gettempdir()),
        tempfile.TemporaryDirectory(prefix="ddpm-checkpoint-") as folder,
    ):
        file = Path(folder) / STATE
        save_file(dict(tensors), file)
        digest, size = _sha256(file)
        ranked = eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None
        record = Record(
            step=step, sha256=digest, size_bytes=size, identity=identity, eval_loss=ranked, device=device
        )
        store.upload(_key(step, STATE), file)
    # without the device of a CPU, so that versions which do not know the field read these records
    fields = record.model_dump(exclude={"device"} if device is None else None)
    store.write(_key(step, RECORD), json.dumps(fields).encode())
    return record


def load_checkpoint(store: Store, step: int) -> Checkpoint:
    """Read one checkpoint. Raises DamageError when it does not match its record, ObjectMissing when absent."""
    record = load_record(store, step)
    _require_size(store, step, record)
    with (
        disk_errors_at(tempfile.gettempdir()),
        tempfile.TemporaryDirectory(prefix="ddpm-checkpoint-") as folder,
    ):
        file = Path(folder) / STATE
        store.download(_key(step, STATE), file)
        digest, size = _sha256(file)
        if (digest, size) != (record.sha256, record.size_bytes):
            raise DamageError(
                f"{store.uri}/{_key(step, STATE)}: sha256 {digest}, its record says {record.sha256}"
            )
        try:
            return Checkpoint(record, load_file(file))
        except SafetensorError as error:
            raise DamageError(f"{store.uri}/{_key(step, STATE)}: not safetensors ({error})") from None


def load_record(store: Store, step: int) -> Record:
    """The record of one checkpoint. Raises DamageError when it is not a valid record, ObjectMissing when absent."""
    key = _key(step, RECORD)
    record = parse_document(Record, store.read(key), f"{store.uri}/{key}", "a checkpoint record")
    if record.step != step:
        raise DamageError(f"{store.uri}/{key}: is the record of step {record.step}")
    return record


def finished_steps(store: Store) -> list[int]:
    """Steps of the checkpoints that have a record, ascending."""
    found = (_RECORD_KEY.fullmatch(info.key) for info in store.list(FOLDER))
    return sorted(int(match[1]) for match in found if match)


def latest_checkpoint(store: Store) -> Checkpoint | None:
    """The newest valid checkpoint; None where there are no checkpoints at all.

    A damaged one is skipped with a warning. If a listed one is gone, another group has written newer ones and deleted
    it: they are listed again. Raises DamageError when there are checkpoints and none can be read.
    """
    for attempt in range(MAX_LISTINGS):
        steps = finished_steps(store)
        if not steps and attempt == 0:
            return None
        for step in reversed(steps):
            try:
                return load_checkpoint(store, step)
            except DamageError as error:
                log.warning("checkpoint %d skipped: %s", step, error)
            except ObjectMissing as error:
                if store.stat(_key(step, RECORD)) is None:
                    break
                log.warning("checkpoint %d skipped: %s", step, error)
        else:
            time.sleep(LISTING_PAUSE_SECONDS)  # the connection may be at fault
    raise DamageError(
        f"{store.uri}/{FOLDER}: there are checkpoints and none can be read (see the warnings); restore one, or delete "
        "them all to train from step 0"
    )


def checkpoint_uri(store: Store, step: int) -> str:
    """URI of a checkpoint, as stored in the registry."""
    return f"{store.uri.rstrip('/')}/{FOLDER}{step:012d}"


def best_steps(store: Store, count: int) -> list[int]:
    """Steps of the `count` checkpoints with the lowest eval/loss, best first; ties go to the newer."""
    ranked: list[tuple[float, int]] = []
    for step in finished_steps(store) if count else ():
        try:
            loss = load_record(store, step).eval_loss
        except (DamageError, ObjectMissing):
            continue  # reading it for a resume warns; it is no candidate
        if loss is not None:
            ranked.append((loss, -step))
    return [-step for _, step in sorted(ranked)[:count]]


def prune_checkpoints(
    store: Store, keep_last: int, protected: Collection[str] = (), keep_best: int = 0
) -> None:
    """Delete all but the newest `keep_last` and the best `keep_best` finished checkpoints, record first, so that
    none is ever incomplete.

    `protected`: URIs of checkpoints that registered models came from; they stay.
    """
    best = best_steps(store, keep_best)
    for step in finished_steps(store)[:-keep_last]:
        if step in best or checkpoint_uri(store, step) in protected:
            continue
        store.delete(_key(step, RECORD))
        store.delete(_key(step, STATE))


def _require_size(store: Store, step: int, record: Record) -> None:
    """Raise before a useless download."""
    key = _key(step, STATE)
    found = store.stat(key)
    if found is None:
        raise ObjectMissing(key, f"{store.uri}/{key}")
    if found.size_bytes != record.size_bytes:
        raise DamageError(
            f"{store.uri}/{key}: {found.size_bytes} bytes, its record says {record.size_bytes}; truncated or replaced"
        )


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time, from copies that training cannot change.

    During an outage of the store, training continues up to the next checkpoint, and the writer retries for minutes
    before it gives up.
    """

    def __init__(
        self,
        store: Store,
        identity: str,
        keep_last: int,
        protected: Collection[str] = (),
        keep_best: int = 0,
        device: TrainingDevice | None = None,
    ) -> None:
        """`protected`: URIs of checkpoints that are never deleted. `device`: for their records."""
        self._store, self._device = store, device
        self._protected = protected
        self._identity = identity
        self._keep_last, self._keep_best = max(keep_last, MIN_KEPT), keep_best
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def submit(
        self, step: int, tensors: Mapping[str, Tensor], eval_loss: float | None = None
    ) -> torch.cuda.Event | None:
        """Copy the tensors and return; waits only while another checkpoint is being written. Raises its error.

        Returns what a GPU has to wait for before it changes the tensors: its own are copied while it computes.
        """
        self.wait()
        staged = self._staging.copy(tensors)
        self._thread = threading.Thread(
            target=self._write, args=(step, staged, eval_loss), name="checkpoint", daemon=True
        )
        self._thread.start()
        return staged.copied

    def wait(self) -> None:
        """Wait for the write in progress. Raises the error of the last write."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, staged: Staged, eval_loss: float | None) -> None:
        try:
            staged.wait()
            retry_during_outage(
                lambda: save_checkpoint(
                    self._store, step, staged.tensors, self._identity, eval_loss, self._device
                )
            )
            retry_during_outage(
                lambda: prune_checkpoints(self._store, self._keep_last, self._protected, self._keep_best)
            )
        except Exception as error:  # noqa: BLE001  (raised in the training thread)
            self._error = error


def _key(step: int, name: str) -> str:
    return f"{FOLDER}{step:012d}/{name}"


def _sha256(file: Path) -> tuple[str, int]:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest(), file.stat().st_size

"""Checkpoints in the store: written without stopping the training, whole or not there at all.

    checkpoints/000000001000/state.safetensors     every tensor of the training state
    checkpoints/000000001000/record.json           last: step, size and sha256 of the state, what it belongs to

A checkpoint without its record was never finished; one whose bytes are not what the record says is damaged. Both
are passed over for the one before, with a warning. Where there are checkpoints and none is whole, a training ends
rather than begin anew.
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

from pipeline.config.base import Settings
from pipeline.config.bounds import Bytes, Name, Sha256
from pipeline.config.json_document import parse_document
from pipeline.disk_errors import disk_errors_at
from pipeline.errors import DamageError
from pipeline.store import ObjectMissing, Store, retry_during_outage

log = logging.getLogger(__name__)

FOLDER = "checkpoints/"
STATE, RECORD = "state.safetensors", "record.json"
FEWEST_KEPT = 2
"""Kept while a training goes on, whatever the settings say: a group that begins may be reading the one before."""
MOST_LOOKS, PAUSE_SECONDS = 5, 2.0
_RECORD_KEY = re.compile(rf"{FOLDER}([0-9]{{12}})/{re.escape(RECORD)}")


class Record(Settings):
    """The proof beside a finished checkpoint."""

    step: int = Field(ge=0, lt=10**12)
    """Finished optimiser steps; the next one takes positions from step * global_batch on."""
    sha256: Sha256
    """Of state.safetensors."""
    size_bytes: Bytes
    """Of state.safetensors."""
    identity: Name
    """Digest of the training it belongs to."""
    eval_loss: float | None = None
    """eval/loss of its averaged weights; None where that was not measured, or was not finite."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, read and checked."""

    record: Record
    tensors: dict[str, Tensor]


def save_checkpoint(
    store: Store, step: int, tensors: Mapping[str, Tensor], identity: str, eval_loss: float | None = None
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
        record = Record(step=step, sha256=digest, size_bytes=size, identity=identity, eval_loss=ranked)
        store.upload(_key(step, STATE), file)
    store.write(_key(step, RECORD), json.dumps(record.model_dump()).encode())
    return record


def load_checkpoint(store: Store, step: int) -> Checkpoint:
    """Read one checkpoint. Raises DamageError when it is not what its record says, ObjectMissing when absent."""
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
    """The record of one checkpoint. Raises DamageError when it is none, ObjectMissing when absent."""
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
    """The newest checkpoint that is whole; None where there is none at all.

    A damaged one is passed over with a warning. Where one is gone that was listed, another group has written newer
    ones and deleted it: they are listed again. Raises DamageError when there are checkpoints and none can be had.
    """
    for look in range(MOST_LOOKS):
        steps = finished_steps(store)
        if not steps and look == 0:
            return None
        for step in reversed(steps):
            try:
                return load_checkpoint(store, step)
            except DamageError as error:
                log.warning("checkpoint %d passed over: %s", step, error)
            except ObjectMissing as error:
                if store.stat(_key(step, RECORD)) is None:
                    break
                log.warning("checkpoint %d passed over: %s", step, error)
        else:
            time.sleep(PAUSE_SECONDS)  # the way here may be to blame
    raise DamageError(
        f"{store.uri}/{FOLDER}: has had checkpoints, and none of them can be read (the warnings say why); restore one, "
        "or delete them all to begin this training anew"
    )


def checkpoint_uri(store: Store, step: int) -> str:
    """Where a checkpoint lies, as the registry remembers it."""
    return f"{store.uri.rstrip('/')}/{FOLDER}{step:012d}"


def best_steps(store: Store, count: int) -> list[int]:
    """Steps of the `count` checkpoints with the lowest eval/loss, best first; of equal ones the newer."""
    ranked: list[tuple[float, int]] = []
    for step in finished_steps(store) if count else ():
        try:
            loss = load_record(store, step).eval_loss
        except (DamageError, ObjectMissing):
            continue  # whoever wants to begin with it is warned; it is no candidate
        if loss is not None:
            ranked.append((loss, -step))
    return [-step for _, step in sorted(ranked)[:count]]


def prune_checkpoints(
    store: Store, keep_last: int, protected: Collection[str] = (), keep_best: int = 0
) -> None:
    """Delete all but the newest `keep_last` and the best `keep_best` finished checkpoints, record first, so none is
    ever half there.

    `protected`: URIs of checkpoints that registered models were cut from; they stay.
    """
    best = best_steps(store, keep_best)
    for step in finished_steps(store)[:-keep_last]:
        if step in best or checkpoint_uri(store, step) in protected:
            continue
        store.delete(_key(step, RECORD))
        store.delete(_key(step, STATE))


def _require_size(store: Store, step: int, record: Record) -> None:
    """Raise before a download that could only be in vain."""
    key = _key(step, STATE)
    found = store.stat(key)
    if found is None:
        raise ObjectMissing(key, f"{store.uri}/{key}")
    if found.size_bytes != record.size_bytes:
        raise DamageError(
            f"{store.uri}/{key}: {found.size_bytes} bytes, its record says {record.size_bytes}: it was cut or replaced"
        )


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time, from copies that training can no longer change.

    While the store does not answer, training goes on up to the next checkpoint, and the writer tries again for
    minutes before it gives up.
    """

    def __init__(
        self,
        store: Store,
        identity: str,
        keep_last: int,
        protected: Collection[str] = (),
        keep_best: int = 0,
    ) -> None:
        """`protected`: URIs of checkpoints that are kept however old they are."""
        self._store = store
        self._protected = protected
        self._identity = identity
        self._keep_last, self._keep_best = max(keep_last, FEWEST_KEPT), keep_best
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def submit(self, step: int, tensors: Mapping[str, Tensor], eval_loss: float | None = None) -> None:
        """Copy the tensors and return; waits only for a checkpoint still being written. Raises its error."""
        self.wait()
        staged = {
            # safetensors wants rows; channels_last is an arrangement, not a value
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        self._thread = threading.Thread(
            target=self._write, args=(step, staged, eval_loss), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written. Raises the error that the last write met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, tensors: dict[str, Tensor], eval_loss: float | None) -> None:
        try:
            retry_during_outage(
                lambda: save_checkpoint(self._store, step, tensors, self._identity, eval_loss)
            )
            retry_during_outage(
                lambda: prune_checkpoints(self._store, self._keep_last, self._protected, self._keep_best)
            )
        except Exception as error:  # noqa: BLE001  (handed to the training thread, which raises it)
            self._error = error


def _key(step: int, name: str) -> str:
    return f"{FOLDER}{step:012d}/{name}"


def _sha256(file: Path) -> tuple[str, int]:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest(), file.stat().st_size

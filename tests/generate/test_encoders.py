"""Processes that encode beside a GPU: the bytes of the thread, nothing loaded that they do not need, and no orphans."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest

from ddpm_pipeline.generate import ray_pool, sample_worker
from ddpm_pipeline.generate.driver import generate
from ddpm_pipeline.generate.encoders import EncoderDied, EncoderProcesses, EncoderThread
from ddpm_pipeline.generate.encoding import EncodedImages
from ddpm_pipeline.generate.plan import shards
from ddpm_pipeline.generate.sample_worker import SampleWorker
from ddpm_pipeline.generate.shard_writer import ShardWriter
from ddpm_pipeline.jobs.ray_session import ray_cluster
from ddpm_pipeline.store import open_store
from tests.generate.sampled import images
from tests.generate.tiny import contents, fill, settings, tiny_model, writer_of

PACKAGES = "sorted({name.partition('.')[0] for name in __import__('sys').modules})"
HEAVY = {"torch", "ray", "mlflow", "boto3", "webdataset", "_pytest"}


def joined(parts: list[EncodedImages]) -> tuple[object, object]:
    return [m for part in parts for m in part.members], sum((p.stats for p in parts[1:]), parts[0].stats)


@pytest.fixture(scope="module")
def processes() -> EncoderProcesses:
    return EncoderProcesses(2)


@pytest.mark.parametrize("number", [1, 2, 7])
@pytest.mark.parametrize(("image_format", "labels"), [("png", True), ("webp", False), ("npy", True)])
def test_processes_make_the_bytes_of_the_thread_in_its_order(
    processes: EncoderProcesses, number: int, image_format: str, labels: bool
) -> None:
    sampled = images(number, image_format, labels)
    expected = EncoderThread().submit(sampled).result()
    assert joined(processes.submit(sampled).result()) == joined(expected)
    assert [member[0] for member in expected[0].members] == [f"{40 + i:012d}" for i in range(number)]


def test_processes_load_only_what_encoding_needs(processes: EncoderProcesses) -> None:
    processes.submit(images(2)).result()
    loaded = processes._pool.submit(eval, PACKAGES).result()
    assert "PIL" in loaded
    assert HEAVY & {*loaded} == set()


def test_a_process_that_dies_fails_its_batches_and_the_next_ones_have_new_processes() -> None:
    encoders = EncoderProcesses(1)
    encoders.submit(images(1)).result()
    (pid,) = encoders._pool._processes
    os.kill(pid, signal.SIGSTOP)
    pending = encoders.submit(images(3))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EncoderDied, match="was killed, perhaps for lack of memory"):
        pending.result()
    assert joined(encoders.submit(images(3)).result()) == joined(EncoderThread().submit(images(3)).result())


def test_what_encoding_raises_is_raised_and_the_processes_go_on(processes: EncoderProcesses) -> None:
    with pytest.raises(KeyError, match="TIFF9"):
        processes.submit(images(2, "tiff9")).result()
    assert processes.submit(images(2)).result()


def test_processes_end_with_a_parent_that_is_killed() -> None:
    code = "from ddpm_pipeline.generate.encoders import EncoderProcesses; import multiprocessing, time"
    code += "; from tests.generate.sampled import images"
    code += "; encoders = EncoderProcesses(2); encoders.submit(images(2)).result()"
    code += "; print(*(child.pid for child in multiprocessing.active_children()), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    gone(pids)


def gone(pids: list[int]) -> None:
    """Wait until the processes are."""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)
    assert alive == []


def test_a_shard_is_the_same_whatever_encodes_it(processes: EncoderProcesses, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")

    def made(name: str, change: Callable[[ShardWriter], None]) -> dict[str, bytes]:
        writer = writer_of(settings(model, f"file://{tmp_path}/{name}", count=23))
        change(writer)
        for unit in shards(writer.generation.spec):
            writer.write(unit)
        return contents(writer.generation.store)

    def with_processes(writer: ShardWriter) -> None:
        writer._encoders = processes

    assert made("thread", lambda writer: None) == made("processes", with_processes)


def test_a_shard_whose_images_a_process_lost_leaves_nothing_and_is_made_when_tried_again(
    tmp_path: Path,
) -> None:
    writer = writer_of(settings(tiny_model(tmp_path / "model"), f"file://{tmp_path}/out", count=10))
    writer._encoders = encoders = EncoderProcesses(1)
    encoders.submit(images(1)).result()
    (pid,) = encoders._pool._processes
    os.kill(pid, signal.SIGSTOP)
    (unit,) = shards(writer.generation.spec)
    with pytest.raises(EncoderDied):
        writer.write(unit, on_images=lambda done: os.kill(pid, signal.SIGKILL) if done == 10 else None)
    assert list(writer.generation.store.list()) == []
    assert writer.write(unit).record.count == 10


@pytest.mark.long
@pytest.mark.stack
@pytest.mark.timeout(180)
def test_workers_of_a_cluster_encode_in_processes_that_end_with_them(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = f"{prefix}/notes"

    class Worker(SampleWorker):
        """As beside a GPU. Notes its processes and what they have loaded."""

        def _load(self, weights: bytes) -> ShardWriter:
            writer = super()._load(weights)
            writer._encoders = sample_worker._encoders(
                writer.engine.spec.model_copy(update={"device": "cuda"})
            )
            self.encoders: Any = writer._encoders
            return writer

        def __call__(self, rows: Any) -> Any:
            outcomes = super().__call__(rows)
            packages = self.encoders._pool.submit(eval, PACKAGES).result()
            note = {"pids": list(self.encoders._pool._processes), "packages": packages}
            open_store(notes).write(f"{os.getpid()}", json.dumps(note).encode())
            return outcomes

    monkeypatch.setattr(ray_pool, "SampleWorker", Worker)
    model = tiny_model(tmp_path / "model")
    with ray_cluster():
        generate(settings(model, f"{prefix}/out", count=47, cpus_per_worker=3), cluster=nullcontext)
    fill(settings(model, f"{prefix}/expected", count=47))
    assert contents(open_store(f"{prefix}/out")) == contents(open_store(f"{prefix}/expected"))
    found = [json.loads(open_store(notes).read(info.key)) for info in open_store(notes).list()]
    assert found
    for note in found:
        assert len(note["pids"]) == 2
        assert HEAVY & {*note["packages"]} == set()
        gone(note["pids"])

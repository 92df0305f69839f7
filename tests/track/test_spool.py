"""No point is lost, none is double, and the caller never waits."""

import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.tracking import Replayed, Run, Spool, SystemSampler, replay, replay_all
from tests.effort import long
from tests.relay import Relay

if TYPE_CHECKING:
    from mlflow import MlflowClient

pytestmark = pytest.mark.stack
NewRun = Callable[..., Run]
INTERVAL = 0.1  # seconds between deliveries, so that tests need not wait


def _spool(directory: Path, uri: str, run: Run) -> Spool:
    return Spool(directory, uri, run.run_id, send_interval_seconds=INTERVAL)


def _series(client: "MlflowClient", run: Run, name: str = "train/loss") -> list[tuple[int, float]]:
    history = client.get_metric_history(run.run_id, name)
    return sorted((point.step, point.value) for point in history)


def _wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("mode", [long("refuse"), long("freeze"), "deaf"])
def test_an_outage_loses_nothing_doubles_nothing_and_holds_up_nobody(
    mode: str,
    relay: Relay,
    client: "MlflowClient",
    new_run: NewRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    run = new_run()
    spool = _spool(tmp_path, relay.uri, run)
    arrived = 0
    for step in range(240):
        if step == 40:
            relay.switch(mode)  # type: ignore[arg-type]
        if step == 200:
            arrived = len(_series(client, run))
            relay.switch("open")
        spool.metrics(step, {"train/loss": 1 / (step + 1), "perf/images_per_s": float(step)})
        time.sleep(0.02)
    assert spool.close(timeout_seconds=30) == 0
    assert _series(client, run) == [(step, 1 / (step + 1)) for step in range(240)]
    assert _series(client, run, "perf/images_per_s") == [(step, float(step)) for step in range(240)]
    assert arrived < 200, "160 calls returned although the server took or answered nothing"
    assert spool.lost == 0


def test_a_killed_process_leaves_points_that_a_replay_delivers(
    server: str, client: "MlflowClient", new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run()
    program = (
        "import sys, time; from pathlib import Path; from ddpm_pipeline.tracking import Spool\n"
        "spool = Spool(Path(sys.argv[1]), sys.argv[2], sys.argv[3], send_interval_seconds=0.05)\n"
        "for step in range(100000):\n"
        "    spool.metrics(step, {'train/loss': step / 2})\n"
        "    print(step, flush=True); time.sleep(0.002)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), server, run.run_id]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    last = -1
    while last < 400:
        last = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    last = max([last, *(int(line) for line in writer.stdout.read().split())])
    writer.wait()
    assert replay(tmp_path, timeout_seconds=20, uri=server).complete
    found = _series(client, run)
    assert len(found) >= last + 1
    assert found == [(step, step / 2) for step in range(len(found))]
    assert replay(tmp_path, timeout_seconds=20, uri=server).complete
    assert _series(client, run) == found


def test_an_offset_lost_after_sending_sends_nothing_twice(
    server: str, client: "MlflowClient", new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run()
    spool = _spool(tmp_path, server, run)
    for step in range(50):
        spool.metrics(step, {"train/loss": float(step)})
    spool.image("samples", 0, np.zeros((4, 4), np.uint8))
    assert spool.close(20) == 0
    before = len(client.list_artifacts(run.run_id, "images"))
    (tmp_path / "offset.json").unlink()
    assert replay(tmp_path, 20, server).complete
    assert _series(client, run) == [(step, float(step)) for step in range(50)]
    assert len(client.list_artifacts(run.run_id, "images")) == before == 2


def test_a_resumed_training_logs_its_repeated_steps_without_a_trace(
    server: str, client: "MlflowClient", new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run()
    picture = np.full((8, 8, 3), 200, np.uint8)
    first = _spool(tmp_path / "before", server, run)
    for step in range(0, 60, 10):
        first.metrics(step, {"train/loss": 1.0 + step, "perf/step_seconds": 0.1})
        first.image("samples", step, picture)
    assert first.close(20) == 0
    again = _spool(tmp_path / "after", server, run)  # from the checkpoint of step 30, on another machine
    for step in range(30, 100, 10):
        again.metrics(step, {"train/loss": 1.0 + step, "perf/step_seconds": 0.2})
        again.image("samples", step, picture)
    assert again.close(20) == 0
    assert _series(client, run) == [(step, 1.0 + step) for step in range(0, 100, 10)]
    times = _series(client, run, "perf/step_seconds")
    assert times == [(step, 0.1 if step < 60 else 0.2) for step in range(0, 100, 10)]
    assert len(client.list_artifacts(run.run_id, "images")) == 2 * 10


def test_points_carried_by_a_checkpoint_outlive_their_machine(
    relay: Relay, server: str, client: "MlflowClient", new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run()
    lost = _spool(tmp_path / "lost", relay.uri, run)
    lost.metrics(0, {"train/loss": 9.0})
    _wait_until(lambda: not lost.undelivered())  # acknowledged, not only arrived
    assert len(_series(client, run)) == 1
    relay.switch("refuse")
    for step in range(1, 5):
        lost.metrics(step, {"train/loss": 9.0 - step})
    carried = lost.undelivered()
    assert lost.close(0.2) == 4
    heir = _spool(tmp_path / "heir", server, run)
    heir.restore(carried)
    for step in range(4, 7):
        heir.metrics(step, {"train/loss": 9.0 - step})
    assert heir.close(20) == 0
    assert _series(client, run) == [(step, 9.0 - step) for step in range(7)]


def test_nan_is_shown_as_nan_and_infinity_as_the_largest_number(
    server: str, client: "MlflowClient", new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run()
    spool = _spool(tmp_path, server, run)
    spool.metrics(0, {"train/loss": math.nan})
    spool.metrics(1, {"train/loss": math.inf})
    spool.metrics(2, {"train/loss": -math.inf})
    assert spool.close(20) == 0
    values = [value for _, value in _series(client, run)]
    assert math.isnan(values[0])
    assert values[1:] == [sys.float_info.max, -sys.float_info.max]


def test_a_point_the_server_refuses_is_put_aside_and_holds_up_nothing(
    server: str, client: "MlflowClient", new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run()
    spool = _spool(tmp_path, server, run)
    spool.metrics(0, {"train/loss": 1.0})
    spool.restore(b'{"t": 1, "s": 1, "m": {"a//b": 1.0}}\n')
    spool.metrics(2, {"train/loss": 3.0})
    assert spool.close(20) == 0
    assert _series(client, run) == [(0, 1.0), (2, 3.0)]
    assert json.loads((tmp_path / "refused.jsonl").read_text())["record"]["s"] == 1


def test_an_illegal_name_is_put_right_and_said_once(
    server: str, client: "MlflowClient", new_run: NewRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = new_run()
    spool = _spool(tmp_path, server, run)
    with caplog.at_level(logging.WARNING):
        spool.metrics(0, {"loss[3]": 1.0})
        spool.metrics(1, {"loss[3]": 2.0})
    assert caplog.text.count("not allowed by MLflow") == 1
    assert spool.close(20) == 0
    assert _series(client, run, "loss_3_") == [(0, 1.0), (1, 2.0)]


def test_points_of_a_deleted_run_wait_until_it_is_restored(
    server: str, client: "MlflowClient", new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run()
    client.delete_run(run.run_id)
    spool = _spool(tmp_path, server, run)
    spool.metrics(0, {"train/loss": 1.0})
    assert spool.close(1.5) == 1
    client.restore_run(run.run_id)
    assert replay(tmp_path, 20, server).complete
    assert _series(client, run) == [(0, 1.0)]


def test_nothing_a_caller_can_pass_raises_into_training(server: str, new_run: NewRun, tmp_path: Path) -> None:
    spool = _spool(tmp_path, server, new_run())
    spool.metrics(0, {"train/loss": "no number"})  # type: ignore[dict-item]
    spool.image("samples", 0, np.zeros((2, 2), np.float32))
    assert spool.lost == 2
    assert spool.close(20) == 0


def test_the_run_page_gets_an_image_it_can_step_through(
    server: str, client: "MlflowClient", new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run()
    spool = _spool(tmp_path / "spool", server, run)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    spool.image("samples/ema", 100, pixels)
    spool.image("samples/ema", 200, png.getvalue())
    assert spool.close(20) == 0
    names = sorted(f.path for f in client.list_artifacts(run.run_id, "images"))
    full = [name for name in names if name.endswith(".png")]
    assert [name.split("+timestamp+")[0] for name in full] == [
        "images/samples~ema+step+100",
        "images/samples~ema+step+200",
    ]
    assert [name for name in names if name.endswith("+compressed.webp")] == [
        name.removesuffix(".png") + "+compressed.webp" for name in full
    ]
    for name in full:
        local = client.download_artifacts(run.run_id, name, str(tmp_path))
        np.testing.assert_array_equal(np.asarray(Image.open(local)), pixels)
    assert client.get_run(run.run_id).data.tags["mlflow.loggedImages"] == "True"
    assert list((tmp_path / "spool" / "files").iterdir()) == []


def test_a_text_artifact_leaves_without_secrets_and_a_picture_untouched(
    server: str, client: "MlflowClient", new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run()
    spool = _spool(tmp_path / "spool", server, run)
    spool.artifact("notes/env.txt", b"AWS_SECRET_ACCESS_KEY=correct-horse\nseed=1\n")
    blob = os.urandom(1000)
    spool.artifact("figures/final.bin", blob)
    assert spool.close(20) == 0
    text = Path(client.download_artifacts(run.run_id, "notes/env.txt", str(tmp_path))).read_text()
    assert "correct-horse" not in text
    assert "seed=1" in text
    assert (
        Path(client.download_artifacts(run.run_id, "figures/final.bin", str(tmp_path))).read_bytes() == blob
    )


def test_two_spools_on_one_directory_deliver_once(
    server: str, client: "MlflowClient", new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run()
    old, new = _spool(tmp_path, server, run), _spool(tmp_path, server, run)
    for step in range(100):
        (old if step % 2 else new).metrics(step, {"train/loss": float(step)})
        time.sleep(0.005)
    old.close(20)
    assert new.close(20) == 0
    assert _series(client, run) == [(step, float(step)) for step in range(100)]


def test_a_spool_at_work_is_not_replayed_by_another(server: str, new_run: NewRun, tmp_path: Path) -> None:
    spool = _spool(tmp_path / "spool", server, new_run())
    spool.metrics(0, {"train/loss": 1.0})
    _wait_until(lambda: spool.undelivered() == b"")
    with pytest.raises(UserError, match="a running process is delivering it"):
        replay(tmp_path / "spool", 1, server)
    assert replay_all(tmp_path, 1, server) == {}
    assert spool.close(20) == 0
    assert replay_all(tmp_path, 5, server) == {tmp_path / "spool": Replayed()}


def test_replaying_a_folder_that_is_no_spool_is_refused(server: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a spool"):
        replay(tmp_path, 1, server)


def test_calls_are_taken_while_the_server_answers_nothing(
    relay: Relay, new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run()
    relay.switch("freeze")  # a call that waited for an answer would never return
    spool = _spool(tmp_path, relay.uri, run)
    values = {f"train/metric_{i}": i / 7 for i in range(12)}
    for step in range(200):
        spool.metrics(step, values)
    assert spool.close(0.1) == 200 * 12


def test_a_living_spool_gives_signs_of_life(
    server: str, client: "MlflowClient", new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run()
    opened = float(client.get_run(run.run_id).data.tags["ddpm.heartbeat"])
    spool = Spool(tmp_path, server, run.run_id, send_interval_seconds=INTERVAL, heartbeat_seconds=0.2)
    _wait_until(lambda: float(client.get_run(run.run_id).data.tags["ddpm.heartbeat"]) > opened + 0.5)
    assert spool.close(20) == 0


def test_load_of_the_node_is_shown_as_system_metrics(
    server: str, client: "MlflowClient", new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run()
    spool = _spool(tmp_path, server, run)
    sampler = SystemSampler(
        spool, started_seconds=run.started_seconds - 1000, node="n3", interval_seconds=0.2
    )
    name = "system/n3/system_memory_usage_percentage"
    _wait_until(lambda: len(_series(client, run, name)) >= 1)
    sampler.close()
    assert spool.close(20) == 0
    step, value = _series(client, run, name)[0]
    assert 1000 <= step <= 1060
    assert 0 < value <= 100

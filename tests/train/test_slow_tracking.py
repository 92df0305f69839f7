"""A training and an MLflow that takes its time: no step waits for an answer, and no point is lost or doubled."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from ddpm_pipeline.progress import no_progress
from ddpm_pipeline.tracking import replay_all, spool_folder
from ddpm_pipeline.train.checkpoint import latest_checkpoint
from ddpm_pipeline.train.training_plan import plan_training
from ddpm_pipeline.train.worker import TrainTask, train_local
from tests.loopback_server import running
from tests.mlflow_servers import wait_until
from tests.train.tiny import tiny

RUN = "0123456789abcdef0123456789abcdef"
INFO = {
    "run_id": RUN,
    "experiment_id": "0",
    "status": "RUNNING",
    "start_time": 1,
    "lifecycle_stage": "active",
    "artifact_uri": f"mlflow-artifacts:/0/{RUN}/artifacts",
}


class Slow(BaseHTTPRequestHandler):
    """One run of MLflow in memory, whose answers come when a test permits. A point is known by all of its parts."""

    may_answer: threading.Event
    answered: list[str]
    points: dict[tuple[str, int, int, float], None]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.may_answer.wait()
        path = urlsplit(self.path).path
        if path.endswith("/log-batch"):
            for point in json.loads(body).get("metrics", []):
                self.points[point["key"], point["timestamp"], point["step"], point["value"]] = None
        self.answered.append(path)
        data = json.dumps(self._content(path)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = answer  # noqa: N815 - names of the standard library

    def _content(self, path: str) -> dict[str, object]:
        metrics = [
            dict(zip(("key", "timestamp", "step", "value"), point, strict=True)) for point in self.points
        ]
        if path.endswith("/runs/get"):
            return {"run": {"info": INFO, "data": {"metrics": metrics}}}
        if path.endswith("/metrics/get-history"):
            asked = parse_qs(urlsplit(self.path).query)["metric_key"]
            return {"metrics": [point for point in metrics if [point["key"]] == asked]}
        return {}

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Slow]]:
    state = {"may_answer": threading.Event(), "answered": [], "points": {}}
    handler = type("Handler", (Slow,), state)
    monkeypatch.setenv("DDPM_SPOOL", str(tmp_path / "spool"))
    with running(handler) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield handler
        handler.may_answer.set()


def test_a_training_takes_all_its_steps_before_mlflow_has_answered_once(
    slow: type[Slow], digits: str, runs: str
) -> None:
    track = {"send_interval_seconds": 0.05, "close_timeout_seconds": 0.0, "system_metrics_seconds": None}
    grid = {"every_steps": 12, "count": 4, "sampler": {"kind": "ddim", "num_steps": 2}}
    config = tiny(digits, runs, track=track, grid=grid)
    plan = plan_training(config)
    task = TrainTask(config, plan.identity, plan.store.uri, plan.index.digest, run_id=RUN)
    train_local(task, no_progress, threading.Event())
    checkpoint = latest_checkpoint(plan.store)
    assert checkpoint is not None
    assert checkpoint.record.step == config.steps
    assert slow.answered == []

    slow.may_answer.set()
    wait_until(lambda: [left.complete for left in replay_all(spool_folder()).values()] == [True], "the spool")
    sent = Counter((name, step) for name, _, step, _ in slow.points)
    assert set(sent.values()) == {1}
    losses = sorted(step for name, step in sent if name == "train/loss")
    assert losses == list(range(8, config.steps + 1, config.log_every_steps))  # the first window is not shown
    images = [path for path in slow.answered if "/images/" in path and path.endswith(".png")]
    assert len(images) == len(set(images)) == 3  # of steps 0, 12 and 24

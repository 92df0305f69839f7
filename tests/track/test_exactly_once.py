"""Whatever fails and whenever the process dies, the server ends up with the first value of every step, once."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_pipeline.tracking.journal import Journal
from ddpm_pipeline.tracking.sender import Sender
from tests.effort import examples


class _Server:
    """MLflow's rules for points, in memory: a point's key is (metric, timestamp, step, value)."""

    def __init__(self) -> None:
        self.points: list[tuple[str, int, int, float]] = []
        self.tags: dict[str, str] = {}
        self.faults: list[str] = []
        self.requests: list[str] = []

    def _faulty(self, request: str, action: Callable[[], Any]) -> Any:
        self.requests.append(request)
        fault = self.faults.pop() if self.faults else "none"
        if fault == "before":
            raise ConnectionError("lost the request")
        result = action()
        if fault == "after":
            raise ConnectionError("lost the answer")
        return result

    def get_run(self, run_id: str) -> SimpleNamespace:
        metrics = {name: value for name, _, _, value in self.points}
        run = SimpleNamespace(
            info=SimpleNamespace(lifecycle_stage="active"), data=SimpleNamespace(metrics=metrics)
        )
        return self._faulty("get_run", lambda: run)

    def get_metric_history(self, run_id: str, name: str) -> list[SimpleNamespace]:
        found = [SimpleNamespace(step=p[2]) for p in self.points if p[0] == name]
        return self._faulty("get_metric_history", lambda: found)

    def log_batch(self, run_id: str, metrics: Sequence[Any] = (), tags: Sequence[Any] = ()) -> None:
        self.tags |= {tag.key: tag.value for tag in tags}
        new = [(m.key, m.timestamp, m.step, m.value) for m in metrics]
        self._faulty(
            "log_batch", lambda: self.points.extend(p for p in dict.fromkeys(new) if p not in self.points)
        )


class _Choosy(_Server):
    """Takes no artifact."""

    def log_artifact(self, run_id: str, local: str, folder: str | None) -> None:
        raise ValueError("no artifacts here")


class _Process:
    """One life of a logging process on one directory."""

    def __init__(self, folder: Path, server: _Server) -> None:
        self.journal = Journal(folder)
        self.sender = Sender(self.journal, server, "run")  # type: ignore[arg-type]

    def deliver(self) -> None:
        while self.sender.send_next():
            continue


operation = st.one_of(
    st.tuples(st.just("log"), st.integers(0, 12)),
    st.tuples(st.just("deliver"), st.lists(st.sampled_from(["none", "before", "after"]), max_size=6)),
    st.tuples(st.just("die"), st.booleans()),
)


@examples(150)
@given(st.lists(operation, max_size=40))
def test_every_step_arrives_once_with_its_first_value(story: list[tuple[str, Any]]) -> None:
    server, clock, first = _Server(), 0, {}
    with TemporaryDirectory() as folder:
        process = _Process(Path(folder), server)
        for what, detail in story:
            clock += 1
            if what == "log":
                first.setdefault(detail, float(clock))
                process.journal.append({"t": clock, "s": detail, "m": {"loss": float(clock)}})
            elif what == "deliver":
                server.faults = list(detail)
                try:
                    process.deliver()
                except ConnectionError:
                    assert not set(detail) <= {"none"}
            else:
                process = _Process(Path(folder), server)
                if detail:  # the disk has the lines, but the note how far they were sent is gone
                    (Path(folder) / "offset.json").unlink(missing_ok=True)
        server.faults = []
        process.deliver()
        assert process.journal.undelivered() == 0
    assert sorted((step, value) for _, _, step, value in server.points) == sorted(first.items())


def test_a_new_run_is_asked_once_for_what_it_has_of_all_metrics(tmp_path: Path) -> None:
    server = _Server()
    process = _Process(tmp_path, server)
    process.journal.append({"t": 1, "s": 1, "m": {f"m{i}": float(i) for i in range(30)}})
    process.deliver()
    process.journal.append({"t": 2, "s": 2, "m": {f"m{i}": float(i) for i in range(30)}})
    process.deliver()
    assert server.requests == ["get_run", "log_batch", "log_batch"]
    assert len(server.points) == 60


def test_a_lost_answer_is_asked_about_before_more_is_sent(tmp_path: Path) -> None:
    server = _Server()
    process = _Process(tmp_path, server)
    process.journal.append({"t": 1, "s": 1, "m": {"loss": 1.0}})
    server.faults = ["after", "none"]
    with pytest.raises(ConnectionError):
        process.deliver()
    # Meanwhile a resumed process, with a directory of its own, sent step 2 with its own timestamp.
    server.points.append(("loss", 50, 2, 2.0))
    process.journal.append({"t": 2, "s": 2, "m": {"loss": 2.0}})
    process.deliver()
    assert server.points == [("loss", 1, 1, 1.0), ("loss", 50, 2, 2.0)]


def test_one_record_of_more_points_than_a_batch_holds_is_sent_whole(tmp_path: Path) -> None:
    server = _Server()
    process = _Process(tmp_path, server)
    process.journal.append({"t": 1, "s": 0, "m": {f"m{i}": float(i) for i in range(1500)}})
    process.journal.append({"t": 2, "s": 1, "m": {"m0": 1.0}})
    process.deliver()
    assert len(server.points) == 1501


def test_a_file_that_is_refused_is_kept_beside_its_record(tmp_path: Path) -> None:
    server = _Choosy()
    process = _Process(tmp_path, server)
    name = process.journal.put_file(b"bytes", ".bin")
    process.journal.append({"t": 1, "p": "report.pdf", "f": name})
    process.journal.append({"t": 2, "s": 1, "m": {"loss": 1.0}})
    process.deliver()
    assert server.points == [("loss", 2, 1, 1.0)]
    assert json.loads((tmp_path / "refused.jsonl").read_text())["record"]["f"] == name
    assert (tmp_path / "files" / name).read_bytes() == b"bytes"


def test_tags_arrive_among_points_and_the_last_value_stays(tmp_path: Path) -> None:
    server = _Server()
    process = _Process(tmp_path, server)
    process.journal.append({"t": 1, "g": {"ddpm.device": "CPU", "ddpm.deterministic": "true"}})
    process.journal.append({"t": 2, "s": 1, "m": {"loss": 0.5}})
    process.journal.append({"t": 3, "g": {"ddpm.device": "NVIDIA H100 (compute capability 9.0)"}})
    server.faults = ["before"]
    with pytest.raises(ConnectionError):
        process.deliver()
    process.deliver()
    assert server.tags == {
        "ddpm.device": "NVIDIA H100 (compute capability 9.0)",
        "ddpm.deterministic": "true",
    }
    assert [point[3] for point in server.points] == [0.5]
    assert process.journal.undelivered() == 0
    assert (process.sender.damaged, process.sender.refused) == (0, 0)

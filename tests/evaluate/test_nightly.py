"""Nights in directories and in this process: repeated, killed at every step, back-filled, deleted, drifting."""

import datetime as dt
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

import ddpm_pipeline.jobs.nightly
from ddpm_pipeline.config.cost import CostConfig
from ddpm_pipeline.config.evaluation import EvaluateConfig, FeatureNetworkConfig
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.nights import NightlyConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.measure import evaluate_generation
from ddpm_pipeline.generate.completeness import check_complete
from ddpm_pipeline.generate.generation_job import GenerationResult
from ddpm_pipeline.generate.manifest import read_manifest
from ddpm_pipeline.generate.spec import read_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.jobs.nightly import DRIFTED, run
from ddpm_pipeline.nightly import make_night, run_nights
from ddpm_pipeline.nightly.history import read_latest, read_nights, write_night
from ddpm_pipeline.nightly.make_night import find_fault, night_settings
from ddpm_pipeline.nightly.retention import apply_retention
from ddpm_pipeline.nightly.run_nights import alert, exclusive
from ddpm_pipeline.nightly.webhook import send
from ddpm_pipeline.progress import no_progress
from ddpm_pipeline.store import FileStore, Store, open_store
from tests.generate.tiny import fill, settings, tiny_card, tiny_model

D1, D2, D3 = (dt.date(2026, 3, day) for day in (1, 2, 3))
Change = Callable[..., NightlyConfig]


@pytest.fixture
def nights(digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Change:
    """Settings of nights in a directory; generations run in this process instead of on Ray."""
    model = tiny_model(tmp_path / "model", tiny_card(size=8))

    def in_process(config: GenerateConfig, progress: object) -> GenerationResult:
        store = open_store(config.output)
        spec = read_spec(store)
        if spec is None or not check_complete(Generation(store, spec)).complete:
            fill(config)
        return GenerationResult("complete", config.output, "", config.count, 1, 1, config.count, 1.0)

    monkeypatch.setattr(ddpm_pipeline.jobs.nightly, "generate", in_process)

    def make(**changes: object) -> NightlyConfig:
        generate = settings(model, str(tmp_path / "nights"), count=20).model_dump()
        return NightlyConfig.model_validate(
            {"generate": generate, "evaluate": {"reference": digits}} | changes
        )

    return make


def objects(config: NightlyConfig) -> dict[str, str]:
    """Every object of the nights with its tag."""
    return {info.key: info.etag for info in open_store(config.generate.output).list()}


def test_a_night_is_made_once_and_not_touched_again(
    nights: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    config = nights()
    assert run(config, no_progress, D1, D1) == 0
    before = objects(config)
    assert run(config, no_progress, D1, D1) == 0
    assert objects(config) == before
    assert "nothing to do" in capsys.readouterr().out


def test_the_record_of_a_night_states_its_cost_at_the_price_of_the_settings(nights: Change) -> None:
    config = nights()
    priced = config.generate.model_copy(update={"cost": CostConfig(per_device_hour=3.6)})
    assert run(config.model_copy(update={"generate": priced}), no_progress, D1, D1) == 0
    (night,) = read_nights(open_store(config.generate.output))
    manifest = read_manifest(open_store(night.prefix))
    assert manifest is not None
    assert night.cost is not None
    assert (night.cost.evaluations_per_image, night.cost.images) == (3, 20)
    assert night.cost.money_per_1000 == pytest.approx(manifest.times.device_seconds / 1000 * 50)


def test_the_evaluation_of_a_night_counts_its_samples(nights: Change) -> None:
    reports: list[tuple[int, int, str]] = []
    assert run(nights(), lambda done, total, note="": reports.append((done, total, note)), D1, D1) == 0
    assert reports[-1] == (20, 20, "evaluated")
    assert {total for _, total, _ in reports} == {20}


def test_three_dates_are_back_filled_and_latest_is_the_newest(nights: Change) -> None:
    config = nights()
    store = open_store(config.generate.output)
    assert run(config, no_progress, D3, D3) == 0
    assert run(config, no_progress, D1, D3) == 0
    assert [night.date for night in read_nights(store)] == [D1, D2, D3]
    latest = read_latest(store)
    assert latest is not None
    assert latest.date == D3
    assert len({night.spec_digest for night in read_nights(store)}) == 3
    for night in read_nights(store):
        manifest = read_manifest(open_store(night.prefix))
        assert manifest is not None
        assert manifest.count == night.count == 20
    assert store.read("index.html").decode().count("data:image/png") == 3


@pytest.mark.parametrize(
    ("module", "step"),
    [
        (make_night, "evaluate_generation"),
        (make_night, "write_night"),
        (run_nights, "render_history"),
        (run_nights, "advance_latest"),
    ],
)
def test_a_job_killed_at_any_step_ends_the_same_when_repeated(
    nights: Change, monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: str
) -> None:
    config = nights()
    store = open_store(config.generate.output)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, step, killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, no_progress, D1, D1)
    assert read_latest(store) is None
    assert run(config, no_progress, D1, D1) == 0
    latest = read_latest(store)
    assert latest is not None
    assert latest == read_nights(store)[0]
    assert {key.partition("/")[0] for key in objects(config)} == {
        "date=2026-03-01",
        "date=2026-03-01.evaluation.json",
        "date=2026-03-01.neighbours.png",
        "history",
        "index.html",
        "latest.json",
    }


def test_the_workers_of_a_night_record_the_sums_of_its_evaluation(nights: Change, digits: str) -> None:
    config = nights()
    assert run(config, no_progress, D1, D1) == 0
    (night,) = read_nights(open_store(config.generate.output))
    quick = evaluate_generation(
        EvaluateConfig(reference=digits, records_only=True), night.prefix, no_progress
    )
    assert quick["frechet"] == pytest.approx(night.evaluation["frechet"], rel=1e-5)
    named = night_settings(config, D2).features
    assert named is not None
    assert named.sha256 is not None
    generate = config.generate.model_copy(update={"features": FeatureNetworkConfig(uri="s3://b/own.pt")})
    chosen = night_settings(config.model_copy(update={"generate": generate}), D2)
    assert chosen.features == generate.features


def test_retention_deletes_samples_and_keeps_records(nights: Change) -> None:
    config = nights(keep_nights=1)
    store = open_store(config.generate.output)
    assert run(config, no_progress, D1, D3) == 0
    assert [night.deleted for night in read_nights(store)] == [True, False, False]
    assert not any(key.startswith("date=2026-03-01") for key in objects(config))
    assert run(config, no_progress, D1, D1) == 0
    assert not any(key.startswith("date=2026-03-01") for key in objects(config))


def lost(store: Store, key: str) -> None:
    store.delete(key)


def torn(store: Store, key: str) -> None:
    store.write(key, store.read(key)[:-9])


def of_other_work(store: Store, key: str) -> None:
    document = json.loads(store.read(key))
    store.write(key, json.dumps(document | {"spec_digest": "0" * 64}).encode())


@pytest.mark.parametrize(
    ("damage", "key"),
    [
        (lost, "shards/000000.tar"),
        (torn, "shards/000000.tar"),
        (lost, "done/000000.json"),
        (lost, "manifest.json"),
        (torn, "manifest.json"),
        (of_other_work, "done/000000.json"),
        (lost, "spec.json"),
    ],
)
def test_a_recorded_night_is_checked_and_completed(
    nights: Change, capsys: pytest.CaptureFixture[str], damage: Callable[[Store, str], None], key: str
) -> None:
    config = nights()
    assert run(config, no_progress, D1, D1) == 0
    before, printed_before = objects(config), capsys.readouterr()
    assert "complete" not in printed_before.out
    samples = open_store(f"{config.generate.output}/date=2026-03-01")
    bytes_before = samples.read(key)
    if key == "spec.json":
        for info in list(samples.list()):
            samples.delete(info.key)
    else:
        damage(samples, key)
    assert run(config, no_progress, D1, D1) == 0
    output = capsys.readouterr()
    assert "2026-03-01: is on record, but " in output.err
    assert "nothing to do" not in output.out
    assert objects(config).keys() == before.keys()
    if key in ("shards/000000.tar", "spec.json"):
        assert samples.read(key) == bytes_before
    assert find_fault(read_nights(open_store(config.generate.output))[0], night_at(config)) is None
    assert run(config, no_progress, D1, D1) == 0
    assert "complete, nothing to do" in capsys.readouterr().out


def night_at(config: NightlyConfig) -> str:
    """Where the samples of the first night are."""
    return f"{config.generate.output}/date=2026-03-01"


def test_a_night_with_a_torn_record_or_evaluation_is_evaluated_and_recorded_again(nights: Change) -> None:
    config = nights()
    store = open_store(config.generate.output)
    assert run(config, no_progress, D1, D1) == 0
    (night,) = read_nights(store)
    torn(store, "history/2026-03-01.json")
    torn(store, "date=2026-03-01.evaluation.json")
    assert run(config, no_progress, D1, D1) == 0
    (again,) = read_nights(store)
    assert again.evaluation.metrics == night.evaluation.metrics
    assert read_latest(store) == again


def test_two_machines_that_make_nights_concurrently_leave_latest_at_the_newest(
    nights: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = nights()
    store = open_store(config.generate.output)
    render = run_nights.render_history

    def delayed(*arguments: Any) -> bytes:
        monkeypatch.setattr(run_nights, "render_history", render)
        monkeypatch.setattr(run_nights, "exclusive", lambda uri: nullcontext())  # as on another machine
        assert run(config, no_progress, D3, D3) == 0
        return render(*arguments)

    monkeypatch.setattr(run_nights, "render_history", delayed)
    assert run(config, no_progress, D2, D2) == 0
    latest = read_latest(store)
    assert latest is not None
    assert latest.date == D3
    assert [night.date for night in read_nights(store)] == [D2, D3]


class Clock(dt.datetime):
    """A machine's clock that is 400 days ahead."""

    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> "Clock":
        return super().now(tz) + dt.timedelta(days=400)  # type: ignore[return-value]


def test_a_clock_that_is_far_ahead_for_one_night_makes_and_deletes_nothing(
    nights: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = nights(keep_days=30, catch_up_nights=1)
    today = dt.datetime.now(dt.UTC).date()
    assert run(config, no_progress, today - dt.timedelta(days=2), today - dt.timedelta(days=1)) == 0
    before = objects(config)
    with monkeypatch.context() as patch:
        patch.setattr(run_nights.dt, "datetime", Clock)
        with pytest.raises(UserError, match="no night is made or deleted by a clock alone"):
            run(config, no_progress)
        # The same where store and machine share the wrong clock, as a directory does.
        patch.setattr(FileStore, "server_time", lambda _: None)
        with pytest.raises(UserError, match=r"40[01] days later"):
            run(config, no_progress)
    assert objects(config) == before
    assert run(config, no_progress) == 0


def test_a_night_of_the_future_is_refused_before_any_work(nights: Change) -> None:
    config = nights()
    with pytest.raises(UserError, match="--to: 2999-01-02 lies in the future"):
        run(config, no_progress, D1, dt.date(2999, 1, 2))
    assert objects(config) == {}


def test_after_a_gap_a_clock_alone_deletes_nothing_and_the_night_after_it_does(
    nights: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    config = nights(keep_nights=1)
    store = open_store(config.generate.output)
    assert run(config, no_progress, D1, D2) == 0
    apply_retention(config, store, D2, D2 + dt.timedelta(days=40))
    assert (
        "retention is postponed to the next night: the one before was 2026-03-02" in capsys.readouterr().out
    )
    aged = config.model_copy(update={"keep_nights": None, "keep_days": 1})
    apply_retention(aged, store, D2, D2 + dt.timedelta(days=7))  # ages count to the night after the newest
    assert [night.deleted for night in read_nights(store)] == [True, False]


def test_retention_keeps_samples_that_are_not_those_on_record(
    nights: Change, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = nights(keep_nights=1)
    store = open_store(config.generate.output)
    assert run(config, no_progress, D1, D3) == 0
    caplog.clear()
    (_, night, _) = read_nights(store)
    assert night.date == D2

    def assert_kept(reason: str) -> None:
        before = objects(config)
        apply_retention(config, store, None, D3)
        assert f"2026-03-02: retention keeps its samples: {reason}" in caplog.text
        assert objects(config) == before

    elsewhere = tmp_path / "precious"
    elsewhere.mkdir()
    write_night(store, night.model_copy(update={"prefix": str(elsewhere)}))
    assert_kept("its record names another prefix")
    write_night(store, night.model_copy(update={"spec_digest": "0" * 64}))
    assert_kept("its prefix holds another generation")
    write_night(store, night)
    samples = open_store(night.prefix)
    beat = {
        "job": "j", "spec_digest": night.spec_digest, "state": "running", "host": "h", "began_at": 0, "images_made": 0,
        "images_per_second": 0, "under_way": [], "failed": {}, "updated_at": time.time(),
    }  # fmt: skip
    samples.write("jobs/j.json", json.dumps(beat).encode())
    assert_kept("a job is running there")
    samples.delete("jobs/j.json")
    samples.write("notes.txt", b"a user's")
    apply_retention(config, store, None, D3)
    assert "2026-03-02: samples deleted by retention; 1 other objects remain" in capsys.readouterr().out
    assert [info.key for info in samples.list()] == ["notes.txt"]


def test_a_night_keeps_the_model_it_began_with(nights: Change, tmp_path: Path) -> None:
    config = nights()
    began = night_settings(config, D1)
    assert began.seed == 20260301
    spec = fill(began)
    pinned = spec.model_copy(update={"model": spec.model.model_copy(update={"name": "digits", "version": 7})})
    open_store(began.output).write("spec.json", pinned.model_dump_json().encode())
    assert night_settings(config, D1).model == "digits/7"


def test_a_drifting_night_sets_the_exit_code_and_calls_the_webhook(nights: Change) -> None:
    heard: list[dict[str, str]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        config = nights(webhook=f"http://127.0.0.1:{server.server_port}/", drift={"min_share": 0})
        config = config.model_copy(update={"drift": config.drift.model_copy(update={"max_deviations": 1e-6})})
        assert run(config, no_progress, D1, D3) == 0
        assert run(config, no_progress, dt.date(2026, 3, 4), dt.date(2026, 3, 4)) == DRIFTED
    finally:
        server.shutdown()
        server.server_close()
    assert heard[0]["date"] == "2026-03-04"
    assert "frechet is" in heard[0]["what"]


def test_a_webhook_that_is_no_url_is_refused_before_the_night_and_not_repeated(nights: Change) -> None:
    settings_given = nights().model_dump(mode="json") | {"webhook": "hooks.example/s3cr3t"}
    with pytest.raises(ValidationError, match="not an http") as refused:
        NightlyConfig.model_validate(settings_given)
    assert refused.value.errors()[0]["type"] == "value_error"  # whose input the command line does not repeat


def test_a_webhook_that_does_not_answer_changes_nothing(
    nights: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    alert(nights(webhook="http://127.0.0.1:9/"), D1, "it drifts")
    printed = capsys.readouterr().err
    assert "it drifts" in printed
    assert "webhook did not accept it" in printed


HEADERS = b"".join(b"X-%d: y\r\n" % number for number in range(200))
ANSWERS = {
    "no HTTP": b"SSH-2.0-OpenSSH\r\n",
    "nothing": b"",
    "refused": b"HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n",
    "to a file": b"HTTP/1.1 302 F\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
    "too many headers": b"HTTP/1.1 200 OK\r\n" + HEADERS + b"\r\n",
    "a long line": b"HTTP/1.1 200 " + b"x" * 70000 + b"\r\n\r\n",
    "half a chunk": b"HTTP/1.1 500 no\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_webhook_with_an_invalid_answer_gives_one_line_without_its_url(
    nights: Change, capsys: pytest.CaptureFixture[str], answer: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(ANSWERS[answer])

        threading.Thread(target=serve, daemon=True).start()
        alert(nights(webhook=f"http://127.0.0.1:{server.getsockname()[1]}/T000/S3CR3T"), D1, "it drifts")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "alert    2026-03-01: it drifts"
    assert second.startswith("alert    the webhook did not accept it: ")
    assert "S3CR3T" not in second


@pytest.mark.parametrize(
    "address",
    [
        "h:9/T S3CR3T",
        "h:9/S3CR3T\nx",
        "h:port/S3CR3T",
        "h:9/S3CR3TÉ",
        f"{'x' * 70}.example/S3CR3T",
        "[::1/S3CR3T",
    ],
)
def test_an_invalid_webhook_url_gives_one_line_without_it(
    nights: Change, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    alert(nights().model_copy(update={"webhook": f"http://{address}"}), D1, "it drifts")
    _, second = capsys.readouterr().err.splitlines()
    assert second.startswith("alert    the webhook did not accept it: ")
    assert "S3CR3T" not in second


def test_a_webhook_whose_answer_never_ends_times_out() -> None:
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                while not ended.wait(0.05):
                    connection.sendall(b"X: y\r\n")

        threading.Thread(target=serve, daemon=True).start()
        failure = send(f"http://127.0.0.1:{server.getsockname()[1]}/", {"text": "t"}, timeout_seconds=0.3)
        ended.set()
    assert failure == "no answer within 0 s"


def test_two_jobs_at_one_prefix_are_refused() -> None:
    with exclusive("here"):
        with pytest.raises(UserError, match="another nightly job is running"), exclusive("here"):
            raise AssertionError("a second one began")
        with exclusive("elsewhere"):
            pass
    with exclusive("here"):
        pass


def test_the_lock_of_a_night_does_not_follow_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with exclusive("here"):
        (lock,) = (tmp_path / "ddpm" / "locks").iterdir()
    victim = tmp_path / "precious.txt"
    victim.write_text("ten years of work")
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(UserError, match=r"\.lock: is a link or no plain file; remove it"), exclusive("here"):
        pass
    assert victim.read_text() == "ten years of work"


def test_dates_in_reverse_order_are_refused(nights: Change) -> None:
    with pytest.raises(UserError, match="swap them"):
        run(nights(), no_progress, D3, D1)


def test_a_night_without_a_feature_network_is_refused_before_any_work(nights: Change, tmp_path: Path) -> None:
    config = nights(evaluate={"reference": str(tmp_path)})
    with pytest.raises(UserError, match="ddpm features train"):
        run(config, no_progress, D1, D1)
    assert objects(config) == {}

"""Nights in directories and in this process: run twice, cut off at every step, back-filled, swept, drifting."""

import datetime as dt
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from pydantic import ValidationError

import jobs.nightly
from jobs.evaluate import evaluate
from jobs.nightly import DRIFTED, alert, only_one, run
from pipeline.config.evaluate import EvaluateConfig, FeatureNetworkConfig
from pipeline.config.generate import GenerateConfig
from pipeline.config.nightly import NightlyConfig
from pipeline.errors import UserError
from pipeline.evaluate.history import read_latest, read_nights
from pipeline.generate.manifest import read_manifest
from pipeline.generate.run import GenerationResult
from pipeline.store import open_store
from tests.generate.tiny import fill, settings, tiny_card, tiny_model

D1, D2, D3 = (dt.date(2026, 3, day) for day in (1, 2, 3))
Change = Callable[..., NightlyConfig]


def silent(done: int, total: int, note: str = "") -> None:
    """Progress for no one."""


@pytest.fixture
def nights(digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Change:
    """Settings of nights in a directory; generations run in this process instead of on Ray."""
    model = tiny_model(tmp_path / "model", tiny_card(size=8))

    def in_process(config: GenerateConfig, progress: object) -> GenerationResult:
        if read_manifest(open_store(config.output)) is None:
            fill(config)
        return GenerationResult("complete", config.output, "", config.count, 1, 1, config.count, 1.0)

    monkeypatch.setattr(jobs.nightly, "generate", in_process)

    def make(**changes: object) -> NightlyConfig:
        generate = settings(model, str(tmp_path / "nights"), count=20).model_dump()
        return NightlyConfig.model_validate(
            {"generate": generate, "evaluate": {"reference": digits}} | changes
        )

    return make


def objects(config: NightlyConfig) -> dict[str, str]:
    """Every object of the nights with its tag."""
    return {info.key: info.etag for info in open_store(config.generate.output).list()}


def test_a_night_is_made_once_and_then_left_alone(nights: Change, capsys: pytest.CaptureFixture[str]) -> None:
    config = nights()
    assert run(config, silent, D1, D1) == 0
    before = objects(config)
    assert run(config, silent, D1, D1) == 0
    assert objects(config) == before
    assert "nothing to do" in capsys.readouterr().out


def test_the_measuring_of_a_night_is_told_in_its_samples(nights: Change) -> None:
    told: list[tuple[int, int, str]] = []
    assert run(nights(), lambda done, total, note="": told.append((done, total, note)), D1, D1) == 0
    assert told[-1] == (20, 20, "measured")
    assert {total for _, total, _ in told} == {20}


def test_three_dates_are_back_filled_and_latest_is_the_newest(nights: Change) -> None:
    config = nights()
    store = open_store(config.generate.output)
    assert run(config, silent, D3, D3) == 0
    assert run(config, silent, D1, D3) == 0
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


@pytest.mark.parametrize("step", ["evaluate", "write_night", "render", "write_latest"])
def test_a_job_cut_off_at_any_step_ends_the_same_when_run_again(
    nights: Change, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    config = nights()
    store = open_store(config.generate.output)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs.nightly, step, killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, silent, D1, D1)
    assert read_latest(store) is None
    assert run(config, silent, D1, D1) == 0
    latest = read_latest(store)
    assert latest is not None
    assert latest == read_nights(store)[0]
    assert {key.partition("/")[0] for key in objects(config)} == {
        "date=2026-03-01",
        "date=2026-03-01.evaluation.json",
        "history",
        "index.html",
        "latest.json",
    }


def test_the_workers_of_a_night_leave_the_sums_by_which_it_is_judged(nights: Change, digits: str) -> None:
    config = nights()
    assert run(config, silent, D1, D1) == 0
    (night,) = read_nights(open_store(config.generate.output))
    quick = evaluate(EvaluateConfig(reference=digits, records_only=True), night.prefix, silent)
    assert quick["frechet"] == pytest.approx(night.evaluation["frechet"], rel=1e-5)
    named = jobs.nightly.night_settings(config, D2).features
    assert named is not None
    assert named.sha256 is not None
    own = config.generate.model_copy(update={"features": FeatureNetworkConfig(uri="s3://b/own.pt")})
    asked = jobs.nightly.night_settings(config.model_copy(update={"generate": own}), D2)
    assert asked.features == own.features


def test_retention_deletes_samples_and_keeps_records(nights: Change) -> None:
    config = nights(keep_nights=1)
    store = open_store(config.generate.output)
    assert run(config, silent, D1, D3) == 0
    assert [night.deleted for night in read_nights(store)] == [True, False, False]
    assert not any(key.startswith("date=2026-03-01") for key in objects(config))
    assert run(config, silent, D1, D1) == 0
    assert not any(key.startswith("date=2026-03-01") for key in objects(config))


def test_a_night_that_began_with_one_model_ends_with_it(nights: Change, tmp_path: Path) -> None:
    config = nights()
    asked = jobs.nightly.night_settings(config, D1)
    assert asked.seed == 20260301
    spec = fill(asked)
    pinned = spec.model_copy(update={"model": spec.model.model_copy(update={"name": "digits", "version": 7})})
    open_store(asked.output).write("spec.json", pinned.model_dump_json().encode())
    assert jobs.nightly.night_settings(config, D1).model == "digits/7"


def test_a_drifting_night_is_told_by_exit_code_and_webhook(nights: Change) -> None:
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
        assert run(config, silent, D1, D3) == 0
        assert run(config, silent, dt.date(2026, 3, 4), dt.date(2026, 3, 4)) == DRIFTED
    finally:
        server.shutdown()
        server.server_close()
    assert heard[0]["date"] == "2026-03-04"
    assert "frechet is" in heard[0]["what"]


def test_a_webhook_that_is_no_address_is_refused_before_the_night_and_not_repeated(nights: Change) -> None:
    told = nights().model_dump(mode="json") | {"webhook": "hooks.example/s3cr3t"}
    with pytest.raises(ValidationError, match="not an http") as refused:
        NightlyConfig.model_validate(told)
    assert refused.value.errors()[0]["type"] == "value_error"  # whose input the command line does not repeat


def test_a_deaf_webhook_changes_nothing(nights: Change, capsys: pytest.CaptureFixture[str]) -> None:
    alert(nights(webhook="http://127.0.0.1:9/"), D1, "it drifts")
    told = capsys.readouterr().err
    assert "it drifts" in told
    assert "webhook did not take it" in told


def test_two_jobs_at_one_prefix_are_impossible() -> None:
    with only_one("here"):
        with pytest.raises(UserError, match="at work there"), only_one("here"):
            raise AssertionError("a second one began")
        with only_one("elsewhere"):
            pass
    with only_one("here"):
        pass


def test_the_lock_of_a_night_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with only_one("here"):
        (lock,) = (tmp_path / "ddpm" / "locks").iterdir()
    victim = tmp_path / "precious.txt"
    victim.write_text("ten years of work")
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(UserError, match=r"\.lock: is a link or no plain file; remove it"), only_one("here"):
        pass
    assert victim.read_text() == "ten years of work"


def test_dates_the_wrong_way_round_are_refused(nights: Change) -> None:
    with pytest.raises(UserError, match="swap them"):
        run(nights(), silent, D3, D1)


def test_a_night_without_a_feature_network_is_refused_before_any_work(nights: Change, tmp_path: Path) -> None:
    config = nights(evaluate={"reference": str(tmp_path)})
    with pytest.raises(UserError, match="ddpm features train"):
        run(config, silent, D1, D1)
    assert objects(config) == {}

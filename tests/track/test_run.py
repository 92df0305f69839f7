"""A run is opened once, resumed by its key, and ends in a clear state."""

import getpass
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.tracking import (
    Run,
    close_stale_runs,
    describe,
    find_latest_run,
    find_run,
    finish,
    image_markdown,
    log_dataset,
    open_run,
    set_tags,
    source_tags,
)
from ddpm_pipeline.tracking.lineage import SOURCE_VARIABLE
from tests.relay import Relay

if TYPE_CHECKING:
    from mlflow import MlflowClient

pytestmark = pytest.mark.stack
NewRun = Callable[..., Run]
EXPERIMENT = "track-tests"


def _artifact(client: "MlflowClient", run: Run, path: str, folder: Path) -> str:
    return Path(client.download_artifacts(run.run_id, path, str(folder))).read_text()


def test_a_new_run_shows_what_was_asked_for(client: "MlflowClient", new_run: NewRun, tmp_path: Path) -> None:
    run = new_run(
        params={"steps": 100, "lr": 1e-3},
        tags={"ddpm.data": "digits"},
        config_yaml="steps: 100\n",
        description="**hello**",
        color="#00aa55",
    )
    seen = client.get_run(run.run_id)
    assert (run.status, run.resumed, seen.info.status, seen.info.run_name) == (
        "RUNNING",
        False,
        "RUNNING",
        "one",
    )
    assert seen.data.params == {"steps": "100", "lr": "0.001"}
    assert seen.data.tags["ddpm.data"] == "digits"
    assert seen.data.tags["mlflow.note.content"] == "**hello**"
    assert seen.data.tags["mlflow.runColor"] == "#00aa55"
    assert _artifact(client, run, "config/config.yaml", tmp_path) == "steps: 100\n"
    assert run.url.endswith(
        f"/#/experiments/{run.experiment_id}/runs/{run.run_id}?workflowType=machine_learning"
    )
    assert str(run) == run.url


@pytest.mark.parametrize("end", [None, "FAILED", "KILLED"])
def test_an_unfinished_run_is_resumed_by_its_key(
    end: str | None, server: str, client: "MlflowClient", new_run: NewRun
) -> None:
    run = new_run(params={"steps": 100})
    if end is not None:
        assert finish(run.run_id, end, "for a test", uri=server)  # type: ignore[arg-type]
        assert client.get_run(run.run_id).info.status == end
        assert client.get_run(run.run_id).data.tags["ddpm.end_reason"] == "for a test"
    again = new_run(params={"steps": 100})
    seen = client.get_run(run.run_id)
    assert (again.run_id, again.resumed, again.status) == (run.run_id, True, "RUNNING")
    assert again.started_seconds == run.started_seconds
    assert seen.info.status == "RUNNING"
    assert "ddpm.end_reason" not in seen.data.tags
    assert seen.data.tags["ddpm.resumes"] == "1"


def test_a_finished_run_is_not_reopened_but_found(server: str, new_run: NewRun) -> None:
    run = new_run()
    assert finish(run.run_id, "FINISHED", uri=server)
    other = new_run()
    assert other.run_id != run.run_id
    assert finish(other.run_id, "FAILED", uri=server)
    found = find_run(EXPERIMENT, run.key, uri=server)
    assert found is not None
    assert (found.run_id, found.status) == (run.run_id, "FINISHED")


def test_a_finished_run_is_gone_on_with_when_asked_for(server: str, new_run: NewRun) -> None:
    run = new_run()
    assert finish(run.run_id, "FINISHED", uri=server)
    again = new_run(reopen_finished=True)
    assert (again.run_id, again.resumed, again.status) == (run.run_id, True, "RUNNING")


def test_other_keys_and_other_experiments_are_other_runs(server: str, new_run: NewRun) -> None:
    run = new_run("a")
    assert new_run("b").run_id != run.run_id
    assert find_run(EXPERIMENT, "no such key", uri=server) is None
    assert find_run("no such experiment", run.key, uri=server) is None


def test_the_latest_run_is_the_one_started_last(server: str, new_run: NewRun) -> None:
    new_run("a")
    last = new_run("b")
    found = find_latest_run(EXPERIMENT, key_prefix=last.key[:-1], uri=server)
    assert found is not None
    assert found.run_id == last.run_id
    assert find_latest_run("no such experiment", uri=server) is None


def test_a_resume_adds_what_a_crash_left_out_and_keeps_the_rest(
    client: "MlflowClient", new_run: NewRun, tmp_path: Path
) -> None:
    new_run(params={"steps": 100}, config_yaml="half: true\n")
    again = new_run(params={"steps": 200, "lr": 0.1}, config_yaml="whole: true\n")
    assert client.get_run(again.run_id).data.params == {"steps": "100", "lr": "0.1"}
    assert _artifact(client, again, "config/config.yaml", tmp_path) == "whole: true\n"


def test_too_many_params_and_unusable_keys_are_refused_before_anything_is_made(new_run: NewRun) -> None:
    with pytest.raises(ValueError, match="params: at most 8"):
        new_run(params={str(i): i for i in range(9)})
    with pytest.raises(ValueError, match="key: "):
        new_run("it's")


def test_a_deleted_experiment_is_named(server: str, client: "MlflowClient") -> None:
    name = f"gone-{time.time_ns()}"
    client.delete_experiment(client.create_experiment(name))
    with pytest.raises(UserError, match=f"experiment '{name}': was deleted"):
        open_run(name, "x", key="k", params={}, tags={}, config_yaml="", uri=server)


def test_no_secret_reaches_the_server(
    client: "MlflowClient", new_run: NewRun, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "zebra-crossing-secret")
    run = new_run(
        params={"store": "s3://k:zebra-crossing-secret@host/b", "password": "zebra2-secret"},
        tags={"note": "zebra-crossing-secret", "api_key": "zebra2-secret"},
        config_yaml="store:\n  secret_access_key: zebra2-secret\n  region: zebra-crossing-secret\n",
        description="Bearer zebra2-secret-token",
    )
    set_tags(run.run_id, {"more": "token=zebra2-secret"}, uri=server)
    describe(run.run_id, "password: zebra2-secret", uri=server)
    log_dataset(run.run_id, "d", "https://u:zebra2-secret@h/x", "0" * 64, uri=server)
    finish(run.run_id, "FAILED", "could not use zebra-crossing-secret", uri=server)
    seen = client.get_run(run.run_id)
    everything = repr(seen.to_dictionary()) + _artifact(client, run, "config/config.yaml", tmp_path)
    assert "zebra" not in everything


def test_the_data_set_is_shown_once_with_its_digest(
    server: str, client: "MlflowClient", new_run: NewRun
) -> None:
    run = new_run()
    for _ in range(2):
        log_dataset(run.run_id, "digits", "s3://ddpm/data/digits", "ab" * 32, num_samples=1797, uri=server)
    inputs = client.get_run(run.run_id).inputs.dataset_inputs
    assert len(inputs) == 1
    dataset = inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("digits", ("ab" * 32)[:36])
    assert "s3://ddpm/data/digits" in dataset.source
    assert "ab" * 32 in dataset.profile
    assert "1797" in dataset.profile


def test_the_end_of_a_run_waits_out_an_outage(relay: Relay, client: "MlflowClient", new_run: NewRun) -> None:
    run = new_run()
    relay.switch("refuse")
    assert not finish(run.run_id, "FINISHED", uri=relay.uri, wait_seconds=0.1)
    assert client.get_run(run.run_id).info.status == "RUNNING"
    relay.switch("open")
    assert finish(run.run_id, "FINISHED", uri=relay.uri, wait_seconds=10)
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_cleanup_closes_silent_runs_only(server: str, client: "MlflowClient", new_run: NewRun) -> None:
    silent, living, ended = new_run("silent"), new_run("living"), new_run("ended")
    finish(ended.run_id, "FINISHED", uri=server)
    foreign = client.create_run(silent.experiment_id)
    later = time.time() + 3600
    client.set_tag(living.run_id, "ddpm.heartbeat", str(later - 60))
    closed = close_stale_runs(EXPERIMENT, idle_minutes=30, now_seconds=later, uri=server)
    ids = {run.run_id for run in closed}
    assert silent.run_id in ids
    assert not ids & {living.run_id, ended.run_id, foreign.info.run_id}
    seen = client.get_run(silent.run_id)
    assert seen.info.status == "KILLED"
    assert "no activity for 60 minutes" in seen.data.tags["ddpm.end_reason"]
    assert client.get_run(living.run_id).info.status == "RUNNING"
    assert close_stale_runs("no such experiment", uri=server) == []


def test_a_run_closed_by_cleanup_is_resumed_by_its_driver(server: str, new_run: NewRun) -> None:
    run = new_run()
    close_stale_runs(EXPERIMENT, idle_minutes=30, now_seconds=time.time() + 3600, uri=server)
    again = new_run()
    assert (again.run_id, again.resumed) == (run.run_id, True)
    assert run.run_id not in {r.run_id for r in close_stale_runs(EXPERIMENT, idle_minutes=30, uri=server)}


def test_a_picture_in_the_description_names_run_and_path() -> None:
    assert image_markdown("r1", "figures/a.png", "x") == "![x](get-artifact?path=figures/a.png&run_uuid=r1)"


def test_the_code_is_named_by_its_commit_and_nothing_is_invented(tmp_path: Path) -> None:
    assert source_tags(tmp_path) == {"mlflow.user": getpass.getuser()}
    here = source_tags()
    assert len(here["mlflow.source.git.commit"]) == 40
    assert here["ddpm.git_dirty"] in ("true", "false")


def test_the_list_of_runs_shows_command_and_user(
    server: str, client: "MlflowClient", new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SOURCE_VARIABLE, json.dumps({"mlflow.user": "who-submitted"}))
    tags = client.get_run(new_run(tags=source_tags()).run_id).data.tags
    assert tags["mlflow.user"] == "who-submitted"
    assert tags["mlflow.source.type"] == "LOCAL"
    assert tags["mlflow.source.name"].startswith("ddpm ")


def test_a_user_without_a_name_is_told_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert source_tags(tmp_path) == {"mlflow.user": f"uid {os.getuid()}"}

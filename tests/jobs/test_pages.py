"""`ddpm dashboard` says where the pages are and where to find what they ask for, and shows no secret."""

import json
import webbrowser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ddpm_pipeline.jobs.cli import app
from ddpm_pipeline.jobs.dashboard import Page, pages_of

TEAM = {
    "RAY_JOB_ADDRESS": "http://ray.example:8265",
    "RAY_AUTH_TOKEN_PATH": "/home/me/my tokens/ray",
    "MLFLOW_TRACKING_URI": "https://mlflow.example",
    "MLFLOW_TRACKING_USERNAME": "me",
    "MLFLOW_TRACKING_PASSWORD": "canary-word",
}


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", *TEAM):
        monkeypatch.delenv(name, raising=False)
    for name, value in TEAM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", TEAM["RAY_JOB_ADDRESS"])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.chdir(tmp_path)


def test_each_page_says_what_it_asks_for_and_where_that_is() -> None:
    assert pages_of(TEAM) == [
        Page("Ray", "http://ray.example:8265", None, "cat '/home/me/my tokens/ray'"),
        Page("MLflow", "https://mlflow.example", "me", "printenv MLFLOW_TRACKING_PASSWORD"),
    ]
    bare = {"RAY_JOB_ADDRESS": "http://ray.example:8265", "MLFLOW_TRACKING_URI": "file:///runs"}
    (ray,) = pages_of(bare)
    assert ray.asks_for == "asks for nothing that this environment knows"
    assert pages_of({**bare, "RAY_AUTH_TOKEN": "x"})[0].secret == "printenv RAY_AUTH_TOKEN"


@pytest.mark.usefixtures("team")
def test_the_command_prints_addresses_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) is None)
    run = CliRunner().invoke
    said = run(app, ["dashboard"])
    assert said.exit_code == 0
    assert said.stdout.splitlines() == [
        "Ray      http://ray.example:8265  asks for the token; this prints it: cat '/home/me/my tokens/ray'",
        "MLflow   https://mlflow.example  asks for user me and a password; this prints it: "
        "printenv MLFLOW_TRACKING_PASSWORD",
    ]
    assert opened == []
    assert [page["service"] for page in json.loads(run(app, ["dashboard", "--json"]).stdout)] == [
        "Ray",
        "MLflow",
    ]
    assert run(app, ["dashboard", "--open"]).exit_code == 0
    assert opened == ["http://ray.example:8265", "https://mlflow.example"]


@pytest.mark.usefixtures("team")
def test_a_machine_without_a_browser_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    said = CliRunner().invoke(app, ["dashboard", "--open"])
    assert (said.exit_code, "no browser could be started here" in said.stderr) == (1, True)


def test_without_any_page_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", *TEAM):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["dashboard"])
    assert (said.exit_code, "start the local stack with `ddpm up`" in said.stderr) == (2, True)

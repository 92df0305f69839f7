"""What a user can get wrong is refused before work starts: one line, exit code 2, nothing written."""

import json
import zipfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.jobs.cli import app
from ddpm_pipeline.store import open_store

NOWHERE = "http://127.0.0.1:9"


def refused(*words: str) -> str:
    """Run `ddpm` with these words; the one line it refuses them with."""
    return told(words, 2, "error: ")


def given_up(*words: str) -> str:
    """Run `ddpm` with these words; the one line it gives up with, which a supervisor takes for a try."""
    return told(words, 1, "failed: ")


def told(words: tuple[str, ...], code: int, kind: str) -> str:
    """The one line that a command ends with."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, (result.output, result.exception)
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith(("pack ", "train "))]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(kind)
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of plain files; the working directory holds no stack."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_ROOT", f"file://{tmp_path}/root")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_help_shows_every_command_with_what_it_does() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    words = "pack index inspect train generate verify submit up status down sample export import"
    for command in words.split(" "):
        assert f" {command} " in result.output
    assert "--dry-run" in CliRunner().invoke(app, ["train", "--help"]).output


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "digits", "output=s3://bucket/look"),
        ("pack", "digits", "fetch_dir=s3://bucket/look"),
        ("train", "digits", "data.cache_dir=s3://bucket/look"),
        ("download", "s3://bucket/samples", "s3://bucket/look"),
        ("export", "digits@champion", "s3://bucket/look"),
        ("publish", "digits@champion", "hf://me/look"),
        ("import", "folder", "s3://bucket/look"),
        ("inspect", NOWHERE, "--sheet", "s3://bucket/look"),
        ("files", "https://example.org/look/"),
        ("schema", "s3://bucket/look"),
        ("keys", "create", "s3://bucket/look"),
    ],
    ids=lambda words: words[0],
)
def test_an_address_is_refused_where_a_path_on_this_machine_is_wanted(
    root: Path, words: tuple[str, ...]
) -> None:
    assert "is no path on this machine; write one, such as ./look" in refused(*words)


def test_a_file_uri_is_a_path_on_this_machine(root: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["schema", (tmp_path / "made").as_uri()])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "made").is_dir()


def test_a_contact_sheet_that_cannot_be_written_is_refused_before_reading(root: Path) -> None:
    assert "folder absent does not exist" in refused("inspect", NOWHERE, "--sheet", "absent/sheet.png")
    assert "is no kind of image" in refused("inspect", NOWHERE, "--sheet", "sheet.pgn")


def test_a_dry_run_prints_settings_that_can_be_given_back(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm_pipeline.train.dry_run.BUDGET_SECONDS", 0.3)
    first = CliRunner().invoke(app, ["train", "digits", "seed=7", "--dry-run"])
    assert first.exit_code == 0
    file = tmp_path / "again.yaml"
    file.write_text(first.stdout)
    again = CliRunner().invoke(app, ["train", "--config", str(file), "--dry-run"])
    assert yaml.safe_load(again.stdout) == yaml.safe_load(first.stdout)
    as_json = CliRunner().invoke(app, ["train", "digits", "seed=7", "--dry-run", "--json"])
    assert json.loads(as_json.stdout)["train"]["seed"] == 7
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "nope"), "preset 'nope': unknown; known are"),
        (("train", "digits", "demo"), "'demo': a second preset"),
        (("train", "digits", "setps=3"), "train.setps: unknown setting; did you mean 'steps'?"),
        (("train", "digits", "steps=many"), "train.steps: input should be a valid integer"),
        (("submit", "train", "digits", "optimizer.lr=-1"), "train.optimizer.lr"),
        (("generate", "digits", "count=0"), "generate.count"),
        (("pack", "source=absent", "dest={root}/x"), "absent"),
        (("train", "--config", "absent.yaml"), "absent.yaml: cannot be read"),
    ],
)
def test_wrong_words_are_refused_by_name(root: Path, words: tuple[str, ...], said: str) -> None:
    assert said in refused(*words)
    assert list(root.iterdir()) == []


def test_an_empty_folder_and_an_unreadable_image_are_refused_and_nothing_is_packed(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("pack", f"source={tmp_path}/empty", "dest={root}/data")
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("cat/1.png", b"\x89PNG\r\n\x1a\n, but no more")
    assert "cat/1.png" in refused("pack", f"source={tmp_path}/bad.zip", "dest={root}/data")
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_without_any_service_named_the_remedy_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "RAY_JOB_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert "MLFLOW_TRACKING_URI is not set: start the local stack" in refused("train", "digits")
    assert "RAY_JOB_ADDRESS: not set; start the local stack" in refused("submit", "train", "digits")


@pytest.mark.stack
def test_missing_buckets_data_models_and_servers_are_refused_by_name(
    stack: LocalStack, prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    data = f"data.uri={prefix}/data"
    assert "no bucket 'absent'" in refused("train", "digits", "data.uri=s3://absent/data")
    assert "no index (" in refused("train", "digits", data)
    assert "no bucket 'absent'" in refused("pack", "digits", "dest=s3://absent/data")
    assert "'nobody'" in refused("generate", "digits", "model=nobody@champion", f"output={prefix}/out")
    assert "no spec.json found" in refused("verify", f"{prefix}/out")
    assert "no spec.json found" in refused("status", f"{prefix}/out")
    pack(PackConfig(source="digits", dest=f"{prefix}/data", channels=1), None)
    runs = f"runs={prefix}/runs"
    with monkeypatch.context() as wrong:
        wrong.setenv("MLFLOW_TRACKING_URI", NOWHERE)
        assert f"MLflow at {NOWHERE}: no answer" in given_up("train", "digits", data, runs)
    with monkeypatch.context() as wrong:
        wrong.setenv("RAY_JOB_ADDRESS", NOWHERE)
        wrong.delenv("RAY_API_SERVER_ADDRESS", raising=False)
        assert NOWHERE in given_up("train", "digits", data, runs)
        assert NOWHERE in given_up("submit", "train", "digits", data, runs)
    with monkeypatch.context() as wrong:
        wrong.setenv("RAY_AUTH_TOKEN", "wrong")
        assert "refuses this token" in refused("submit", "train", "digits", data, runs)
    assert list(open_store(f"{prefix}/runs").list()) == []


def test_a_dry_run_of_a_pack_looks_at_source_and_destination(root: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused("pack", "source=nowhere", f"dest={root}/a", "--dry-run")
    open_store(f"{root}/taken").write("x.tar", b"")
    assert "contains other data" in refused("pack", "source=digits", f"dest={root}/taken", "--dry-run")
    done = CliRunner().invoke(app, ["pack", "source=digits", f"dest={root}/a", "--dry-run"])
    assert done.exit_code == 0
    assert "# dest     is empty" in done.stdout
    assert not (root / "a").exists()


def test_a_pack_prints_what_it_did_as_json(root: Path) -> None:
    words = ["pack", "source=digits", f"dest={root}/a", "channels=1", "--json"]
    for already in (False, True):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0
        said = json.loads(done.stdout)
        assert (said["num_samples"], said["already_complete"]) == (1797, already)
        assert said["index_digest"]


def test_an_interrupted_pack_prints_how_to_resume(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpm_pipeline.jobs.pack.pack", interrupted)
    done = CliRunner().invoke(app, ["pack", "source=digits", f"dest={root}/a"])
    assert done.exit_code == 130
    assert "run the same command to resume" in done.stderr


@pytest.mark.parametrize("name", ["set-*", "what?", "{a,b}", "set.tar"])
def test_a_destination_that_stands_for_several_places_is_refused(root: Path, name: str) -> None:
    assert "would be read as a pattern of shards" in refused(
        "pack", "source=digits", f"dest={root}/{name}", "channels=1"
    )

"""Every command says what it does, shows lines to copy, and completes what is typed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from ddpm_pipeline.config.model_card import ImageShape, ModelCard
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.jobs.cli import app
from ddpm_pipeline.jobs.runner import SECTIONS, JobArguments, command_of, preset_file, settings_of
from tests.generate.tiny import tiny_model


def commands(group: object = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every command that does something, with the words that call it."""
    here = group or typer.main.get_command(app)
    children = getattr(here, "commands", None)
    if children is None:
        yield path, here
        return
    for name, child in children.items():
        yield from commands(child, (*path, name))


ALL = dict(commands())


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_says_what_a_command_does_and_gives_examples_of_it(path: tuple[str, ...]) -> None:
    wide = {"COLUMNS": "160", "TERMINAL_WIDTH": "160"}
    result = CliRunner(env=wide).invoke(app, [*path, "--help"])
    assert result.exit_code == 0
    assert (getattr(ALL[path], "help", None) or "").endswith(".")
    assert re.search(rf"^ +ddpm {' '.join(path)}( |$)", result.output, re.M), result.output


def test_examples_are_shown_as_they_are_typed() -> None:
    assert "steps=[10,20] kinds=[ddim,dpm++2m]" in CliRunner().invoke(app, ["tune-sampler", "--help"]).output


def test_every_command_stands_under_a_heading() -> None:
    output = CliRunner().invoke(app, ["--help"]).output
    for heading in ("Data", "Models", "Samples", "Nights", "On a cluster", "This machine"):
        assert f"─ {heading} ─" in output
    assert "─ Commands ─" not in output


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ddpm train dig", "digits"),
        ("ddpm train optimizer.l", "optimizer.lr="),
        ("ddpm generate sampler.k", "sampler.kind="),
        ("ddpm submit generate coun", "count="),
        ("ddpm features train ste", "steps="),
        ("ddpm tune-sampler kin", "kinds="),
        ("ddpm schedule catch", "catch_up_nights="),
        ("ddpm eval", "evaluate"),
    ],
)
def test_the_shell_completes_commands_presets_and_settings(typed: str, offered: str) -> None:
    asked = {"_DDPM_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    result = CliRunner().invoke(app, env=asked, prog_name="ddpm")
    assert offered in result.stdout.split(), result.output


def digits_model(folder: Path) -> Path:
    """A model as the preset trains it."""
    config = settings_of(TrainConfig, "train", JobArguments(preset="digits"))
    card = ModelCard(
        net=config.net,
        schedule=config.schedule,
        objective=config.objective,
        image=ImageShape(channels=1, size=8),
    )
    return tiny_model(folder / "model", card)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_job_prints_the_settings_of_a_file_as_json(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDPM_ROOT", f"file://{tmp_path}/root")
    monkeypatch.setattr("ddpm_pipeline.train.dry_run.BUDGET_SECONDS", 0.3)
    words = command_of(section)
    assert words in ALL
    file = tmp_path / "settings.yaml"
    file.write_text(preset_file("digits-fast" if section == "distill" else "digits").read_text())
    # the network to estimate is the teacher's
    words = (*words, f"teacher={digits_model(tmp_path)}") if section == "distill" else words
    result = CliRunner().invoke(app, [*words, f"--config={file}", "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)[section]
    assert SECTIONS[section].model_validate(settings).model_dump(mode="json") == settings

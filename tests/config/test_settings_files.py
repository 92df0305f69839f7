"""Settings files over other files, their version, renamed settings, and what is taken from the environment."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.load import load_settings
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.runner import SECTIONS, presets
from tests.commands import ddpm


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_ROOT", "s3://here")


def written(folder: Path, **files: str) -> Path:
    """Write NAME.yaml for each; the path of the last."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{list(files)[-1]}.yaml"


def loaded(file: Path, *words: str) -> TrainConfig:
    return load_settings(TrainConfig, "train", [file], words, sections=tuple(SECTIONS), presets=presets())


def refusal(file: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        loaded(file, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_laid_over_presets_and_files_of_which_the_later_win(tmp_path: Path) -> None:
    (tmp_path / "team").mkdir()
    (tmp_path / "team/common.yaml").write_text("base: demo\ntrain: {seed: 5, steps: 800}\n")
    file = written(
        tmp_path,
        faster="train: {optimizer: {lr: 0.01}, seed: 6}\n",
        mine="base: [digits, team/common.yaml, faster.yaml]\ntrain: {log_every_steps: 10}\n",
    )
    config = loaded(file)
    assert (config.name, config.steps, config.seed) == ("demo", 800, 6)
    assert (config.optimizer.lr, config.log_every_steps, config.net.image_size) == (0.01, 10, 8)


def test_a_base_is_found_from_the_folder_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, common="base: digits\ntrain: {seed: 9}\n", mine="base: common.yaml\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert loaded(file).seed == 9


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("no-such", "base 'no-such' is no preset and no path of a .yaml file; known presets are"),
        ("[digits, 5]", "base '5' is no preset"),
        ("{a: digits}", "is no preset"),
        ("absent.yaml", r"absent.yaml: cannot be read"),
        ("mine.yaml", "is based on this file itself"),
        ("between.yaml", "is based on this file itself"),
    ],
)
def test_a_base_that_cannot_be_used_is_named(tmp_path: Path, base: str, said: str) -> None:
    file = written(tmp_path, between="base: mine.yaml\n", mine=f"base: {base}\n")
    assert said in refusal(file)


def test_bases_without_end_are_refused(tmp_path: Path) -> None:
    files = {f"f{n}": f"base: [f{n - 1}.yaml, f{n - 1}.yaml]\n" for n in range(1, 40)}
    assert "is based on more than 100 files" in refusal(written(tmp_path, f0="base: digits\n", **files))


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    assert loaded(written(tmp_path, mine="config_version: 1\nbase: digits\n")).name == "digits"
    for version in ("2", "'1'", "true"):
        assert "this program reads 1" in refusal(
            written(tmp_path, mine=f"config_version: {version}\nbase: digits\n")
        )


def test_a_variable_of_the_environment_is_taken_only_where_the_setting_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM", "vision")
    file = written(
        tmp_path, mine='base: digits\ntrain: {name: "{env:TEAM}-digits", runs: "{root}/$TEAM/{TEAM}"}\n'
    )
    monkeypatch.setenv("STEPS", "700")
    config = loaded(file, "track.experiment={env:TEAM}", "steps={env:STEPS}")
    assert (config.name, config.runs) == ("vision-digits", "s3://here/$TEAM/{TEAM}")
    assert (config.track.experiment, config.steps) == ("vision", 700)
    assert "NO_SUCH_TEAM: not set, but '{env:NO_SUCH_TEAM}' needs it" in refusal(
        file, "name={env:NO_SUCH_TEAM}"
    )
    monkeypatch.setenv("MY_API_KEY", "123")
    assert "MY_API_KEY looks like a secret" in refusal(file, "name={env:MY_API_KEY}")


class Optimizer(Settings):
    lr: float = 0.1


class Section(Settings):
    renamed: ClassVar[Mapping[str, str]] = {"learning_rate": "optimizer.lr", "optimizer.momentum": "beta"}
    optimizer: Optimizer = Optimizer()
    beta: float = 0.0


def test_a_renamed_setting_is_read_with_a_warning_that_has_the_line_to_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(
        tmp_path, mine="# of before\nsection:\n  learning_rate: 0.5\n  optimizer:\n    momentum: 0.9\n"
    )
    config = load_settings(Section, "section", [file])
    assert config == Section(optimizer=Optimizer(lr=0.5), beta=0.9)
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}:3: section.learning_rate is now section.optimizer.lr; write: section: {{optimizer: {{lr: 0.5}}}}",
        f"{file}:5: section.optimizer.momentum is now section.beta; write: section: {{beta: 0.9}}",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_renamed_setting_on_the_command_line_wins_over_files_and_is_answered_with_the_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(tmp_path, mine="section: {optimizer: {lr: 0.2}}\n")
    assert load_settings(Section, "section", [file], ["learning_rate=0.3"]).optimizer.lr == 0.3
    assert caplog.messages == ["section.learning_rate is now section.optimizer.lr; write: optimizer.lr=0.3"]
    with pytest.raises(UserError, match=r"which is set as well; remove the former"):
        load_settings(Section, "section", [file], ["learning_rate=0.3", "optimizer.lr=0.4"])


def test_two_files_are_compared_with_bases_and_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(
        tmp_path, mine="base: digits\ntrain: {steps: 770, ema: {decay: 0.5}, seed: 0}\nfeatures: {data: x}\n"
    )
    assert ddpm("config", "diff", "digits", str(file)) == 1
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["digits", str(file)]
    told = {row.split()[0]: row.split()[1:] for row in rows}
    assert told["train.steps"][1] == "770"
    assert told["train.ema.decay"][1] == "0.5"
    assert told["features.data"][1] == "x"
    assert "train.seed" not in told  # 0 is the default
    assert ddpm("config", "diff", str(file), str(file), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {}
    assert ddpm("config", "diff", "digits", "digist") == 2
    assert "preset 'digist': unknown" in capsys.readouterr().err


def test_a_part_of_the_settings_is_compared_as_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, a="train: {steps: 5}\n", b="train: {steps: 6, seed: 1}\n")
    assert ddpm("config", "diff", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--json") == 1
    found: Any = json.loads(capsys.readouterr().out)
    assert found == {"train.steps": {"a": 5, "b": 6}, "train.seed": {"a": None, "b": 1}}

"""The examples do what they say."""

import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.runner import SECTIONS, JobArguments, settings_of
from tests.docs.lines import REPOSITORY
from tests.docs.test_commands import parsed
from tests.generate.tiny import fill, settings, tiny_model

EXAMPLES = REPOSITORY / "examples"


def test_plain_webdataset_reads_every_sample_of_a_generation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(settings(tiny_model(tmp_path / "model"), f"file://{tmp_path}/out", count=23))
    example = runpy.run_path(str(EXAMPLES / "read_generation.py"))
    samples: list[dict[str, Any]] = list(example["samples"](tmp_path / "out"))
    assert [sample["json"]["index"] for sample in samples] == list(range(23))
    assert {sample["png"].shape for sample in samples} == {(4, 4, 3)}
    example["main"](tmp_path / "out")
    assert capsys.readouterr().out == "class 0: 8\nclass 1: 8\nclass 2: 7\n"


def test_the_training_loop_repeats_itself_to_the_last_bit(tmp_path: Path) -> None:
    train = runpy.run_path(str(EXAMPLES / "training_loop.py"))["train"]
    loss, images = train(tmp_path, 3)
    again, same = train(tmp_path, 3)
    assert 0 < loss == again
    assert images.shape == (8, 1, 8, 8)
    assert images.equal(same)


def commands() -> Iterator[tuple[str, ...]]:
    for line in (EXAMPLES / "own_images.sh").read_text().splitlines():
        if line.startswith("ddpm "):
            words = shlex.split(line.replace('"$@"', "steps=500"))
            yield tuple(word.replace("$settings", str(EXAMPLES / "photos.yaml")) for word in words[1:])


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_of_own_images_is_one(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_ROOT", "s3://ddpm")
    section, params = parsed(words)
    if "words" in params:
        call = JobArguments.of(params["words"] or [], params["config"] or [])
        settings_of(SECTIONS[section], section, call)

"""The examples do what they say."""

import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFont, features

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data import load_index, pack
from ddpm_pipeline.jobs.runner import SECTIONS, JobArguments, settings_of
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


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All cells of an example in percent format, run in a folder; what they have defined."""
    file = EXAMPLES / name
    assert file.read_text().startswith("# %% [markdown]\n# # ")
    monkeypatch.chdir(folder)
    return runpy.run_path(str(file))


def test_the_training_loop_learns_and_repeats_itself_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run("training_loop.py", tmp_path, monkeypatch)
    history, images = found["history"], found["images"]
    assert sum(history[-20:]) < 0.5 * sum(history[:20])
    assert images.shape == (8, 1, 8, 8)
    torch.manual_seed(0)
    net = found["UNet"](found["net"].config)
    again = found["losses"](net, found["ConstantEMA"](net), found["schedule"], seed=0)
    assert [next(again) for _ in range(3)] == history[:3]


@pytest.mark.long
def test_a_network_of_ones_own_learns_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("own_network.py", tmp_path, monkeypatch)
    history, images = found["history"], found["images"]
    assert sum(history[-20:]) < 0.8 * sum(history[:20])
    assert (images.shape, images.dtype) == ((16, 1, 8, 8), torch.uint8)


def test_a_look_at_a_generation_counts_averages_and_shows_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(settings(tiny_model(tmp_path / "model"), f"file://{tmp_path}/out", count=23))
    monkeypatch.setenv("PREFIX", f"file://{tmp_path}/out")
    run("look_at_generation.py", tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "23 images of (4, 4, 1), sampled by ddim" in said
    for name, count in (("nought", 8), ("one", 8), ("two", 7)):
        assert f"{name}: {count} images, mean level " in said
    with Image.open(tmp_path / "classes.png") as picture:
        assert picture.width > 2 * picture.height  # three rows of nine


@pytest.fixture
def emoji() -> dict[str, Any]:
    """The functions of examples/emoji/render.py, where what it needs is installed."""
    render = runpy.run_path(str(EXAMPLES / "emoji" / "render.py"))
    if (fault := render["missing"]()) is not None:
        pytest.skip(fault)
    return render


def test_emoji_are_packed_as_a_color_data_set_whose_classes_are_their_groups(
    tmp_path: Path, emoji: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "emoji"
    monkeypatch.setattr("sys.argv", ["render.py", str(folder), "--limit", "3", "--size", "36"])
    emoji["main"]()
    monkeypatch.setenv("DDPM_ROOT", f"file://{tmp_path}")
    settings = settings_of(
        PackConfig, "pack", JobArguments(preset="emoji-32", overrides=(f"source={folder}",))
    )
    assert pack(settings).num_samples == 27
    index = load_index(settings.dest)
    assert index.class_names == tuple(sorted(path.name for path in folder.iterdir()))
    # The preset's network knows as many classes as there are groups.
    network = settings_of(TrainConfig, "train", JobArguments(preset="emoji-32")).net
    assert (network.num_classes, network.image_size) == (len(index.class_names), 32)


def test_what_rendering_emoji_needs_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = runpy.run_path(str(EXAMPLES / "emoji" / "render.py"))["missing"]
    font, emoji_test = tmp_path / "font.ttf", tmp_path / "emoji-test.txt"
    assert (
        missing(font, emoji_test)
        == f"{font} is missing: install fonts-noto-color-emoji, or name another file"
    )
    font.touch()
    assert missing(font, emoji_test) == f"{emoji_test} is missing: install unicode-data, or name another file"
    emoji_test.touch()
    monkeypatch.setattr(features, "check", lambda feature: False)
    assert missing(font, emoji_test).endswith("install libfribidi0")


def test_an_emoji_is_drawn_on_a_transparent_background_and_only_if_the_font_has_one_picture_for_it(
    emoji: dict[str, Any],
) -> None:
    font = ImageFont.truetype(emoji["FONT"], emoji["STRIKE"])
    face = emoji["draw"]("\N{GRINNING FACE}", font, 40)
    assert (face.size, face.mode) == ((40, 40), "RGBA")
    assert face.getpixel((0, 0))[3] == 0
    assert face.getpixel((20, 10))[3] == 255
    family = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}"
    assert emoji["draw"](family, font, 40) is not None
    assert emoji["draw"]("\N{MAN}\N{WOMAN}", font, 40) is None


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

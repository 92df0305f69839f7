"""The pictures of docs/gallery.md are the first samples of a model, at each setting from the same noise."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, ScheduleConfig
from ddpm_pipeline.config.model_card import DistillationInfo
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.loaded_model import LoadedModel, load_model
from docs.emoji import COLUMNS, draw_guidance, emoji_figures
from tests.generate.tiny import tiny_card, tiny_model

CELL = 64
SAMPLER = SamplerConfig(kind="dpm++2m", num_steps=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(tiny_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def student(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    taught = DistillationInfo(
        teacher="model", teacher_sha256=model.card.weights.sha256, method="none", sampler=SAMPLER, steps=0
    )
    own = {"objective": ObjectiveConfig(target="v"), "schedule": ScheduleConfig(), "distillation": taught}
    card = tiny_card().model_copy(update=own)
    return load_model(str(tiny_model(tmp_path_factory.mktemp("student"), card)))


def test_every_picture_is_drawn_and_drawn_again_with_the_same_bytes(
    model: LoadedModel, student: LoadedModel, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    paths = emoji_figures(model, student, tmp_path / "new", lambda done, total: seen.append((done, total)))
    rows = {path.stem: (Image.open(path).height - 16 + 2) // (CELL + 2) for path in paths}
    assert rows == {
        "classes": 3,
        "guidance": 3,  # scales
        "steps": 4,
        "few-steps": 4,  # the teacher's, and three of the student
        "reverse": 6,  # two for each of three samples
    }
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in emoji_figures(model, student, tmp_path / "new")] == before


def test_a_row_holds_the_first_samples_at_its_scale(model: LoadedModel) -> None:
    picture = draw_guidance(model)
    width = COLUMNS * (CELL + 2) - 2
    for row, scale in enumerate((1.0, 1.5, 3.0)):
        sampler = SamplerConfig(kind="dpm++2m", num_steps=20, guidance_scale=scale)
        images = model.sample(COLUMNS, sampler=sampler, batch_size=COLUMNS)
        top = 8 + row * (CELL + 2)
        line = picture[top : top + CELL, -8 - width : -8]
        shown = [
            line[8, n * (CELL + 2) + 8, 0] for n in range(COLUMNS)
        ]  # a point in each image's first pixel
        assert shown == images[:, 0, 0, 0].tolist()
    assert not np.array_equal(picture[8 : 8 + CELL], picture[8 + CELL + 2 :][:CELL])


def test_a_model_without_classes_is_refused(student: LoadedModel, tmp_path: Path) -> None:
    plain = load_model(str(tiny_model(tmp_path / "model", tiny_card(classes=False))))
    with pytest.raises(UserError, match="guidance needs a model with classes"):
        emoji_figures(plain, student, tmp_path / "out")


def test_a_student_that_was_not_distilled_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was not distilled"):
        emoji_figures(model, model, tmp_path / "out")

"""An evaluation shows samples beside the reference images nearest to them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_pipeline.config.evaluation import EvaluateConfig
from ddpm_pipeline.data.formats.provenance import has_mark
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.evaluate.document import load_evaluation, load_neighbours, neighbours_location
from ddpm_pipeline.evaluate.measure import evaluate_generation
from ddpm_pipeline.evaluate.nearest_reference import nearest_reference
from ddpm_pipeline.evaluate.neighbours_picture import PER_BLOCK, draw_neighbours, neighbour_rows
from ddpm_pipeline.features.feature_set import FeatureSet
from ddpm_pipeline.progress import no_progress
from ddpm_pipeline.store import open_store
from tests.evaluate.made import config
from tests.generate.tiny import fill, settings, tiny_card, tiny_model

RED, GREEN = (200, 10, 20), (10, 180, 40)
CELL = 64


def of_colors(*colors: tuple[int, int, int]) -> FeatureSet:
    """Images of 2x2 pixels, each of one color; the vectors play no part."""
    pixels = np.array([np.repeat(color, 4) for color in colors], np.uint8)
    vectors = np.zeros((len(colors), 2), np.float32)
    return FeatureSet("n" * 64, vectors, None, None, pixels, np.arange(len(colors)).astype(np.uint64))


def top_of_tiles(picture: np.ndarray) -> int:
    """The first line of the picture that holds pixels of an image."""
    return int(np.flatnonzero((picture == RED).all(2).any(1))[0])


def test_the_nearest_come_first_and_the_farthest_last() -> None:
    distances = np.random.default_rng(0).permutation(200).astype(float)
    closest, spread = neighbour_rows(distances)
    assert distances[closest].tolist() == list(range(PER_BLOCK))
    shown = distances[spread]
    assert len(shown) == PER_BLOCK
    assert (shown[0], shown[-1]) == (PER_BLOCK, 199)
    assert set(np.diff(shown)) <= {7, 8}


@pytest.mark.parametrize("count", [1, PER_BLOCK, PER_BLOCK + 1, 2 * PER_BLOCK])
def test_few_samples_are_all_shown_once(count: int) -> None:
    closest, spread = neighbour_rows(np.arange(count, dtype=float))
    assert closest + spread == list(range(count))


def test_the_sample_is_left_and_its_nearest_reference_image_right() -> None:
    far_green = (GREEN[0] + 30, GREEN[1], GREEN[2])
    samples = of_colors(far_green, RED)
    reference = of_colors((0, 0, 255), GREEN, (255, 255, 0), RED)
    nearest = nearest_reference(samples, reference, config())
    assert nearest.rows.tolist() == [1, 3]
    assert nearest.distances.tolist() == [60, 0]  # 30 levels in each of four pixels
    picture = draw_neighbours(samples, reference, nearest, channels=3, first_index=0)
    tile = picture[top_of_tiles(picture) :][:CELL]
    lines = [color for color in (RED, GREEN, far_green) if (tile == color).all(2).any()]
    assert lines == [RED, GREEN, far_green]
    starts = [int(np.flatnonzero((tile == c).all(2).all(0))[0]) for c in (RED, far_green, GREEN)]
    assert starts[0] < starts[1] < starts[2]
    assert starts[2] - starts[1] == CELL + 2
    assert (tile[:, starts[0] + CELL + 2 : starts[0] + 2 * CELL + 2] == RED).all()


def test_a_near_copy_is_marked_in_red() -> None:
    reference = of_colors(*((10 * n, 0, 0) for n in range(20)))
    samples = of_colors((0, 0, 0), (95, 0, 0), (0, 200, 0))
    nearest = nearest_reference(samples, reference, config())
    assert nearest.distances.tolist()[:2] == [0, 10]
    assert nearest.limit == 20
    picture = draw_neighbours(samples, reference, nearest, channels=3, first_index=0)
    # Only the captions of the first two are red, in the columns of the first two pairs.
    red = (picture[..., 0] > 150) & (picture[..., 1] < 60) & (picture[..., 2] < 80)
    pair = 2 * CELL + 2 + 10
    assert [bool(red[:, 12 + n * pair : 12 + (n + 1) * pair].any()) for n in range(4)] == [
        True,
        True,
        False,
        False,
    ]


def test_the_picture_lies_beside_the_evaluation_that_names_it(digits: str, tmp_path: Path) -> None:
    made = settings(tiny_model(tmp_path / "model", tiny_card(size=8)), str(tmp_path / "out"), first_index=7)
    spec = fill(made)
    evaluation = evaluate_generation(EvaluateConfig(reference=digits), made.output, no_progress)
    assert load_evaluation(made.output) == evaluation
    picture = load_neighbours(evaluation)
    assert picture is not None
    width, height = Image.open(io.BytesIO(picture)).size
    assert width > 6 * 2 * CELL
    assert height > 8 * CELL  # two blocks of four lines
    mark = spec.mark()
    assert mark is None or has_mark(picture, mark)
    again = evaluate_generation(EvaluateConfig(reference=digits), made.output, no_progress)
    assert again.neighbours_sha256 == evaluation.neighbours_sha256
    parent, key = neighbours_location(made.output)
    open_store(parent).write(key, picture + b"x")
    with pytest.raises(DamageError, match=r"out\.neighbours\.png: missing, or of another evaluation; run"):
        load_neighbours(evaluation)
    open_store(parent).delete(key)
    with pytest.raises(DamageError, match="missing"):
        load_neighbours(evaluation)


def test_documents_without_a_picture_are_written_and_read_as_before(digits: str, tmp_path: Path) -> None:
    made = settings(tiny_model(tmp_path / "model", tiny_card(size=8)), str(tmp_path / "out"))
    fill(made)
    evaluation = evaluate_generation(EvaluateConfig(reference=digits), made.output, no_progress)
    older = evaluation.model_copy(update={"neighbours_sha256": None})
    assert "neighbours_sha256" not in older.model_dump(mode="json")
    assert load_neighbours(older) is None

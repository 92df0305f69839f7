"""Nearest neighbors, found in blocks, are those of a search over all pairs."""

import numpy as np
import pytest

from ddpm_pipeline.features import distances
from ddpm_pipeline.features.distances import nearest_distances, nearest_neighbours


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_CHUNK", 7)
    monkeypatch.setattr(distances, "_BLOCK", 5)


def vectors(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 6), dtype=np.uint8)


@pytest.mark.parametrize("k", [1, 3, 23])
@pytest.mark.parametrize("same", [False, True])
def test_blocks_give_what_all_pairs_give(k: int, same: bool) -> None:
    queries = vectors(24, 0)
    others = queries if same else vectors(23, 1)
    gaps = np.sqrt(((queries[:, None].astype(float) - others[None]) ** 2).sum(2))
    if same:
        np.fill_diagonal(gaps, np.inf)
    seen: list[int] = []
    found = nearest_neighbours(
        queries, others, k, same=same, progress=lambda done, total, note="": seen.append(done)
    )
    assert seen == [7, 14, 21, 24]
    assert np.allclose(found.distances, np.sort(gaps, 1)[:, :k])
    assert np.allclose(np.take_along_axis(gaps, found.rows, 1), found.distances)
    assert np.allclose(nearest_distances(queries, others, same=same), gaps.min(1))


def test_too_few_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="others holds 3 vectors, fewer than 3 neighbours"):
        nearest_neighbours(vectors(3, 0), vectors(3, 0), 3, same=True)

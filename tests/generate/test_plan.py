"""The plan is arithmetic: every sample once, in batches that do not depend on the count."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_pipeline.config.bounds import MAX_IMAGES, MAX_SHARDS
from ddpm_pipeline.generate.class_labels import classes_of
from ddpm_pipeline.generate.plan import batches, end_of, locate, num_shards, shard, shard_number, shards
from ddpm_pipeline.generate.spec import ClassPlan, Spec
from tests.effort import examples
from tests.generate.tiny import plan_of, settings, tiny_model


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    folder: Path = tmp_path_factory.mktemp("plan")
    return plan_of(settings(tiny_model(folder / "model"), f"file://{folder}/out"))[0]


def sized(spec: Spec, count: int, shard_size: int, batch_size: int, first_index: int = 0) -> Spec:
    sizes = {"count": count, "shard_size": shard_size, "batch_size": batch_size, "first_index": first_index}
    return spec.model_copy(update=sizes)


plans = st.tuples(st.integers(1, 400), st.integers(1, 60), st.integers(1, 25), st.integers(0, 1000)).filter(
    lambda p: p[2] <= p[1]
)


@given(plans)
@examples(200)
def test_every_sample_is_planned_exactly_once_and_in_order(
    spec: Spec, plan: tuple[int, int, int, int]
) -> None:
    planned = sized(spec, *plan)
    seen: list[int] = []
    for unit in shards(planned):
        assert unit.first == planned.first_index + len(seen)
        kept = [i for batch in batches(planned, unit) for i in batch.samples[: batch.keep]]
        assert len(kept) == unit.count
        seen += kept
    assert seen == list(range(planned.first_index, planned.first_index + planned.count))


@given(plans, st.integers(0, 400))
@examples(200)
def test_a_sample_keeps_its_company_when_the_count_is_raised(
    spec: Spec, plan: tuple[int, int, int, int], more: int
) -> None:
    small = sized(spec, *plan)
    large = small.model_copy(update={"count": small.count + more})
    for index in (small.first_index, small.first_index + small.count - 1):
        before, after = locate(small, index)[1], locate(large, index)[1]
        assert (before.first, before.size) == (after.first, after.size)


def test_a_tail_is_named_by_its_count_and_a_full_shard_is_not(spec: Spec) -> None:
    assert [u.key for u in shards(sized(spec, 23, 10, 5))] == [
        "shards/000000.tar",
        "shards/000001.tar",
        "shards/000002-0003.tar",
    ]
    assert shard(sized(spec, 30, 10, 5), 2).done_key == "done/000002.json"
    assert num_shards(sized(spec, 10**9, 1000, 64)) == 10**6


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("000002", 2),
        ("1234567", 1234567),
        ("000002-0003", 2),
        ("2", None),
        ("00002", None),
        ("000002-", None),
        ("0000x2", None),
    ],
)
def test_only_names_of_shards_are_read_as_such(name: str, number: int | None) -> None:
    assert shard_number(name) == number


def test_the_last_batch_of_a_shard_is_cut_by_its_size_and_not_by_the_count(spec: Spec) -> None:
    plan = sized(spec, 23, 10, 4, first_index=100)
    sizes = [
        [(batch.first, batch.size, batch.keep) for batch in batches(plan, unit)] for unit in shards(plan)
    ]
    assert sizes == [
        [(100, 4, 4), (104, 4, 4), (108, 2, 2)],
        [(110, 4, 4), (114, 4, 4), (118, 2, 2)],
        [(120, 4, 3)],
    ]


def test_a_shards_name_says_at_which_count_the_plan_has_it(spec: Spec) -> None:
    tens = sized(spec, 23, 10, 5)
    assert [end_of(tens, name) for name in ("000000", "000007", "000007-0003")] == [10, 80, 73]
    # A full shard has no count in its name, no tail is longer than a shard, or empty.
    assert [end_of(tens, name) for name in ("000007-0010", "000007-0011", "000007-0000")] == [None] * 3
    # A tail's count has as many digits as the program writes.
    assert end_of(tens, "000007-3") is None
    last = sized(spec, 10, 10, 5, first_index=MAX_IMAGES - 70)
    assert [end_of(last, name) for name in ("000006", "000007", "000007-0001")] == [70, None, None]
    single = sized(spec, 1, 1, 1)
    assert end_of(single, f"{MAX_SHARDS - 1}") == MAX_SHARDS
    assert end_of(single, f"{MAX_SHARDS}") is None


def test_a_sample_outside_the_generation_is_refused_by_name(spec: Spec) -> None:
    with pytest.raises(ValueError, match=r"index must be in 7\.\.16"):
        locate(sized(spec, 10, 5, 5, first_index=7), 17)
    with pytest.raises(ValueError, match=r"number must be in 0\.\.1"):
        shard(sized(spec, 10, 5, 5), 2)
    with pytest.raises(ValueError, match=r"number must be in 0\.\.1"):
        shard(sized(spec, 10, 5, 5), -1)


def test_classes_in_turn_follow_the_index_and_not_the_batch(spec: Spec) -> None:
    listed = spec.model_copy(update={"classes": ClassPlan(labels=(2, 0), weights=None)})
    assert classes_of(listed, torch.tensor([0, 1, 2, 101])).tolist() == [2, 0, 2, 0]
    assert classes_of(spec.model_copy(update={"classes": None}), torch.arange(3)) is None


def test_drawn_classes_follow_their_weights_and_are_the_same_in_any_batch(spec: Spec) -> None:
    plan = ClassPlan(labels=(0, 1, 2), weights=(1.0, 0.0, 3.0))
    drawn = spec.model_copy(update={"classes": plan})
    index = torch.arange(4000)
    labels = classes_of(drawn, index)
    assert labels is not None
    assert (labels == 1).sum() == 0
    assert abs((labels == 0).double().mean().item() - 0.25) < 0.03  # 4 standard errors
    again = torch.cat([classes_of(drawn, part) for part in index.flip(0).split(7)]).flip(0)
    assert torch.equal(labels, again)
    other = classes_of(drawn.model_copy(update={"seed": 1}), index)
    assert not torch.equal(labels, other)

"""Workers that divide the state among them (FSDP): the same training, the same checkpoints, and repeatable bits."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.store import open_store
from ddpm_pipeline.train.checkpoint import Checkpoint, finished_steps
from ddpm_pipeline.train.dry_run import estimate
from ddpm_pipeline.train.memory import state_memory
from tests.effort import long
from tests.train.group import Outcome, run_group
from tests.train.tiny import tiny

STEPS, STOP = 12, 6


def config_of(digits: str, folder: Path, name: str, **workers: object) -> TrainConfig:
    """Shares of 7 and 6 samples in micro-batches of at most 3: two workers need as many passes only with padding."""
    return tiny(
        digits,
        f"file://{folder}/{name}",
        steps=STEPS,
        global_batch=13,
        grid={"every_steps": STOP, "count": 10, "sampler": {"kind": "ddim", "num_steps": 2}},
        workers={"num_workers": 2, "micro_batch": 3} | workers,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def ddp(digits: str, folder: Path) -> Outcome:
    return run_group(config_of(digits, folder, "ddp"), 2, folder)


@pytest.fixture(scope="module")
def fsdp(digits: str, folder: Path) -> Outcome:
    return run_group(config_of(digits, folder, "fsdp", sharding="fsdp"), 2, folder)


def last(outcome: Outcome, world: int = 2) -> Checkpoint:
    assert outcome.exit_codes == [0] * world
    assert outcome.checkpoint is not None
    return outcome.checkpoint


def assert_same_course(points: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    assert points.keys() == expected.keys()
    for step, point in expected.items():
        for name in (name for name in point if name.startswith(("train/", "eval/"))):
            assert points[step][name] == pytest.approx(point[name], rel=1e-4, abs=1e-5), (step, name)


def test_a_divided_training_is_the_same_training_and_its_checkpoint_the_same_file(
    ddp: Outcome, fsdp: Outcome
) -> None:
    assert_same_course(fsdp.points, ddp.points)
    whole, divided = last(ddp), last(fsdp)
    assert whole.record.identity == divided.record.identity
    assert divided.record.eval_loss == pytest.approx(whole.record.eval_loss, rel=1e-4)
    assert whole.tensors.keys() == divided.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert divided.tensors[name].dtype == tensor.dtype, name
        torch.testing.assert_close(divided.tensors[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.long
def test_stopped_and_resumed_by_as_many_workers_it_ends_in_the_same_bits(
    digits: str, folder: Path, fsdp: Outcome
) -> None:
    config = config_of(digits, folder, "halves", sharding="fsdp")
    assert last(run_group(config, 2, folder, stop_at=STOP)).record.step == STOP
    resumed, whole = last(run_group(config, 2, folder)).tensors, last(fsdp).tensors
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.long
def test_one_worker_two_that_divide_the_state_and_one_again_take_turns(
    digits: str, folder: Path, ddp: Outcome
) -> None:
    points: dict[int, dict[str, float]] = {}
    for sharding, world, stop_at in [("fsdp", 1, 4), ("fsdp", 2, 4), ("ddp", 1, None)]:
        config = config_of(digits, folder, "turns", num_workers=[1, 2], sharding=sharding)
        outcome = run_group(config, world, folder, stop_at=stop_at)
        last(outcome, world)
        points |= outcome.points
    assert_same_course(points, ddp.points)
    torch.testing.assert_close(last(outcome, 1).tensors, last(ddp).tensors, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_a_checkpoint_of_workers_that_hold_all_is_resumed_by_workers_that_divide_it(
    digits: str, folder: Path, ddp: Outcome
) -> None:
    shutil.copytree(folder / "ddp", folder / "on")
    config = config_of(digits, folder, "on", sharding="fsdp")
    store = open_store(last_uri(config, ddp))
    newest = finished_steps(store)[-1]
    store.delete(f"checkpoints/{newest:012d}/record.json")
    outcome = run_group(config, 2, folder)
    assert_same_course(outcome.points, {step: p for step, p in ddp.points.items() if step in outcome.points})
    assert last(outcome).record.step == STEPS


def last_uri(config: TrainConfig, outcome: Outcome) -> str:
    return f"{config.runs}/{config.name}-{last(outcome).record.identity}"


def test_workers_that_divide_a_diverging_training_end_together(digits: str, folder: Path) -> None:
    config = config_of(digits, folder, "diverging", sharding="fsdp")
    wild = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"lr": 1e38}), "max_skipped_steps": 1}
    )
    outcome = run_group(wild, 2, folder)
    assert outcome.exit_codes == [1, 1]
    assert {step for step, _, _ in outcome.positions} < set(range(STEPS))


@pytest.mark.parametrize("sharding", ["ddp", long("fsdp")])
def test_gradients_sent_in_bfloat16_change_little_and_name_another_training(
    digits: str, folder: Path, ddp: Outcome, sharding: str
) -> None:
    plain = config_of(digits, folder, "ddp")
    config = config_of(digits, folder, f"half-{sharding}", sharding=sharding, reduce_dtype="bfloat16")
    outcome = run_group(config, 2, folder)
    assert config.digest("d") != plain.digest("d")
    assert last(outcome).record.identity != last(ddp).record.identity
    for step, point in ddp.points.items():
        assert outcome.points[step]["train/loss"] == pytest.approx(point["train/loss"], rel=0.02)
    assert not torch.equal(last(outcome).tensors["net/stem.weight"], last(ddp).tensors["net/stem.weight"])


def test_how_the_state_is_held_does_not_name_a_training(digits: str, folder: Path) -> None:
    plain, divided = (config_of(digits, folder, "n", sharding=kind) for kind in ("ddp", "fsdp"))
    assert plain.digest("d") == divided.digest("d")
    assert "reduce_dtype" not in plain.identity("d")


@pytest.mark.parametrize("setting", [{"sharding": "fsdp"}, {"reduce_dtype": "bfloat16"}])
def test_settings_between_workers_are_refused_for_one(
    digits: str, runs: str, setting: dict[str, str]
) -> None:
    with pytest.raises(ValidationError, match=rf"{next(iter(setting))} has no effect with one worker"):
        tiny(digits, runs, workers=setting)


def test_a_compiled_network_cannot_be_divided(digits: str, runs: str) -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        tiny(digits, runs, compile=True, workers={"num_workers": 2, "sharding": "fsdp"})


def test_memory_of_a_divided_state_is_a_part_and_the_blocks_that_are_computed(digits: str, runs: str) -> None:
    whole = state_memory(tiny(digits, runs, workers={"num_workers": 4}))
    divided = tiny(digits, runs, workers={"num_workers": 4, "sharding": "fsdp"})
    part = state_memory(divided)
    assert part.weights == math.ceil(whole.weights / 4)
    assert (part.gradients, part.optimizer, part.averages) == (part.weights, 2 * part.weights, part.weights)
    assert part.collected > 0
    assert state_memory(divided, world=1).weights == whole.weights
    assert estimate(divided).memory_parts["collected weights"] == part.collected

"""eval/loss and the average it is of: the same for the same weights, lower for better ones, and what is kept by it."""

import math
from pathlib import Path

import pytest
import torch

from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import Store, open_store
from ddpm_pipeline.train.checkpoint import (
    CheckpointWriter,
    best_steps,
    checkpoint_uri,
    finished_steps,
    load_record,
    prune_checkpoints,
    save_checkpoint,
)
from ddpm_pipeline.train.checkpoint_eval import FixedEvaluation
from ddpm_pipeline.train.export import export_model
from ddpm_pipeline.train.loop import Trainer
from ddpm_pipeline.train.state import TrainState, initial_state
from ddpm_pipeline.train.training_plan import plan_training
from tests.train.test_loop import run_alone
from tests.train.tiny import tiny

CPU = torch.device("cpu")
TENSORS = {"x": torch.zeros(1)}


def evaluated(config: TrainConfig, state: TrainState, world: int = 1) -> float | None:
    trainer = Trainer(config, NoiseSchedule.from_config(config.schedule), state.net, CPU, world)
    return FixedEvaluation(trainer, config.data, load_index(config.data.uri)).loss(state)


def records_of(config: TrainConfig) -> dict[int, float | None]:
    store = plan_training(config).store
    return {step: load_record(store, step).eval_loss for step in finished_steps(store)}


def test_the_evaluation_is_a_function_of_the_averaged_weights_alone(digits: str, runs: str) -> None:
    config = tiny(digits, runs)
    state = initial_state(config, CPU)
    first = evaluated(config, state)
    assert first == evaluated(config, state, world=3)
    state.step = 17
    with torch.no_grad():
        for parameter in state.net.parameters():
            parameter.add_(1.0)  # the raw weights, which nobody samples from
    assert evaluated(config, state) == first
    state.ema.update(state.net, 1)
    assert evaluated(config, state) != first


def test_a_fresh_network_that_says_nothing_misses_the_noise_by_its_variance(digits: str, runs: str) -> None:
    config = tiny(digits, runs, checkpoint={"eval_samples": 256})
    assert evaluated(config, initial_state(config, CPU)) == pytest.approx(1.0, abs=0.02)


def test_the_evaluation_falls_while_training_and_is_the_same_after_a_stop(digits: str, runs: str) -> None:
    config = tiny(digits, f"{runs}/a", steps=32, global_batch=32)
    run_alone(config)
    losses = [loss for loss in records_of(config).values() if loss is not None]
    assert losses == sorted(losses, reverse=True)
    stopped = tiny(digits, f"{runs}/b", steps=32, global_batch=32)
    run_alone(stopped, stop_at=19)
    run_alone(stopped)
    kept = records_of(config)
    again = records_of(stopped)
    # the checkpoint of the stop stands between two marks, where an undisturbed training has none
    assert {step: again[step] for step in kept if step in again} == {s: kept[s] for s in kept if s in again}
    assert again[32] == kept[32]


def test_a_checkpoint_of_a_stop_between_two_marks_is_not_ranked(digits: str, runs: str) -> None:
    config = tiny(digits, runs)
    run_alone(config, stop_at=11)
    steps = records_of(config)
    assert steps[max(steps)] is None
    assert max(steps) % config.checkpoint.every_steps


def test_without_evaluation_samples_nothing_is_ranked(digits: str, runs: str) -> None:
    config = tiny(digits, runs, checkpoint={"every_steps": 8, "eval_samples": 0})
    run_alone(config)
    assert set(records_of(config).values()) == {None}
    with pytest.raises(ValueError, match="keep_best has no effect while eval_samples is 0"):
        tiny(digits, runs, checkpoint={"every_steps": 8, "eval_samples": 0, "keep_best": 2})


@pytest.fixture
def store(runs: str) -> Store:
    return open_store(f"{runs}/one")


def test_the_best_the_newest_and_the_registered_checkpoints_are_kept(store: Store) -> None:
    for step, loss in [(1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3), (5, None), (6, 0.9)]:
        save_checkpoint(store, step, TENSORS, "id", loss)
    prune_checkpoints(store, keep_last=1, protected={checkpoint_uri(store, 1)}, keep_best=2)
    assert finished_steps(store) == [1, 2, 4, 6]


def test_what_is_not_finite_not_measured_or_damaged_is_never_the_best(store: Store) -> None:
    for step, loss in [(1, math.nan), (2, None), (3, -math.inf), (4, 0.2), (5, 0.1)]:
        save_checkpoint(store, step, TENSORS, "id", loss)
    Path(store.uri.removeprefix("file://"), "checkpoints/000000000005/record.json").write_text("{")
    assert best_steps(store, 3) == [4]
    assert best_steps(store, 0) == []


def test_of_equally_good_checkpoints_the_newer_is_kept(store: Store) -> None:
    for step in (1, 2, 3):
        save_checkpoint(store, step, TENSORS, "id", 0.5)
    assert best_steps(store, 1) == [3]


def test_the_writer_ranks_what_it_writes(store: Store) -> None:
    writer = CheckpointWriter(store, "id", keep_last=2, keep_best=1)
    for step, loss in [(1, 0.1), (2, 0.3), (3, 0.2), (4, 0.2)]:
        writer.submit(step, TENSORS, loss)
    writer.wait()
    assert finished_steps(store) == [1, 3, 4]


POWER = {"kind": "power", "widths": (0.05, 0.2)}


def test_power_averages_are_all_in_the_checkpoint_and_the_first_is_exported(
    digits: str, runs: str, tmp_path: Path
) -> None:
    config = tiny(digits, runs, ema=POWER)
    tensors = run_alone(config)
    assert {name.split("/")[1] for name in tensors if name.startswith("ema/")} == {
        "power-0.050",
        "power-0.200",
    }
    plan = plan_training(config)
    from ddpm_pipeline.train.checkpoint import latest_checkpoint

    checkpoint = latest_checkpoint(plan.store)
    assert checkpoint is not None
    card = export_model(plan, checkpoint, None, tmp_path)
    assert card.weights.kind == "power-0.050"
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "model.safetensors")
    for name, value in exported.items():
        assert torch.equal(value, tensors[f"ema/power-0.050/{name}"]), name
    assert any(not torch.equal(v, tensors[f"ema/power-0.200/{n}"]) for n, v in exported.items())


def test_a_training_with_power_averages_goes_on_in_the_same_bits(digits: str, runs: str) -> None:
    undisturbed = run_alone(tiny(digits, f"{runs}/a", ema=POWER))
    run_alone(tiny(digits, f"{runs}/b", ema=POWER), stop_at=9)
    resumed = run_alone(tiny(digits, f"{runs}/b", ema=POWER))
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())


def test_another_average_is_another_training_and_an_idle_setting_of_one_is_refused(
    digits: str, runs: str
) -> None:
    names = {
        tiny(digits, runs, ema=ema).digest("d") for ema in ({}, POWER, {"kind": "power"}, {"decay": 0.9})
    }
    assert len(names) == 4
    for wrong, said in [
        ({"widths": (0.1,)}, "widths has no effect"),
        ({"kind": "power", "decay": 0.9}, "decay has no effect"),
        ({"kind": "power", "widths": (0.1, 0.1001)}, "widths must differ"),
    ]:
        with pytest.raises((ValueError, UserError), match=said):
            tiny(digits, runs, ema=wrong)

"""The loop: the learning rate, the sums of a window, and steps that do not depend on how work is cut up."""

import math
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_pipeline.config.training import OptimizerConfig, TrainConfig, WorkerConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.reading.loader import Loader
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.nets.flops import sample_flops
from ddpm_pipeline.train import session
from ddpm_pipeline.train.checkpoint import latest_checkpoint
from ddpm_pipeline.train.finetune import stage_initial
from ddpm_pipeline.train.loop import NonFiniteError, Trainer, chunk_loss, micro_batches, train_step
from ddpm_pipeline.train.run_logger import RunLogger
from ddpm_pipeline.train.state import TrainState, initial_state, learning_rate
from ddpm_pipeline.train.step_metrics import StepMetrics
from ddpm_pipeline.train.training_plan import plan_training
from ddpm_pipeline.train.worker import TrainTask, train_local
from tests.effort import examples, long
from tests.train.tiny import tiny

CPU = torch.device("cpu")


def trainer_of(config: TrainConfig, world: int = 1) -> tuple[Trainer, TrainState]:
    state = initial_state(config, CPU)
    return Trainer(config, NoiseSchedule.from_config(config.schedule), state.net, CPU, world), state


def gradients(
    config: TrainConfig, rank: int, world: int, step: int = 3, equal_sizes: bool = False
) -> tuple[list[torch.Tensor], StepMetrics]:
    """What one rank would hand to the exchange of gradients."""
    trainer, state = trainer_of(config, world)
    trainer = replace(trainer, equal_sizes=equal_sizes)
    for parameter in state.net.parameters():  # zero-initialised outputs would hide most gradients
        with torch.no_grad():
            parameter.add_(0.05)
    window = StepMetrics(trainer.schedule.T, CPU)
    loader = Loader(config.data, load_index(config.data.uri), config.seed, config.global_batch, rank, world)
    batch = next(iter(loader.batches(step, step + 1)))
    found: list[torch.Tensor] = []
    state.optimizer.step = lambda: found.extend(p.grad.clone() for p in state.net.parameters())  # type: ignore[method-assign]
    train_step(trainer, state, batch, window)
    return found, window


@examples(100)
@given(st.integers(0, 500), st.integers(501, 2000), st.sampled_from(["none", "cosine", "linear"]))
def test_the_learning_rate_rises_to_its_peak_and_never_exceeds_it(
    warmup: int, steps: int, decay: str
) -> None:
    config = OptimizerConfig(lr=0.5, warmup_steps=warmup, decay=decay)  # type: ignore[arg-type]
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[max(0, warmup - 1)] == 0.5
    assert rates[:warmup] == sorted(set(rates[:warmup]))
    assert rates[-1] == 0.5 if decay == "none" else rates[-1] <= 0.5 / (steps - warmup) * 2


@pytest.mark.parametrize("world", [long(2), 3, long(5)])
def test_shares_of_any_number_of_workers_average_to_the_gradient_of_the_whole_batch(
    digits: str, runs: str, world: int
) -> None:
    config = tiny(digits, runs, optimizer={"clip_norm": None})
    whole, window = gradients(config, 0, 1)
    shares = [gradients(config, rank, world) for rank in range(world)]
    for i, expected in enumerate(whole):
        mean = torch.stack([share[0][i] for share in shares]).mean(0)
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-6)
    total = sum(float(torch.stack(share[1]._losses).sum()) for share in shares)
    assert total == pytest.approx(float(torch.stack(window._losses).sum()), rel=1e-5)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("importance", [False, True])
def test_timesteps_do_not_depend_on_how_a_batch_is_cut_up(
    digits: str, runs: str, stratified: bool, importance: bool
) -> None:
    config = tiny(
        digits,
        runs,
        objective={"target": "v", "weighting": "min-snr"},
        timesteps={"importance": importance, "stratified": stratified},
    )
    trainer, _ = trainer_of(config)
    (batch,) = Loader(config.data, load_index(digits), 0, 14).batches(2, 3)
    whole, t = chunk_loss(trainer, batch)
    drawn = [chunk_loss(trainer, piece)[1] for piece in micro_batches(batch, 4)]
    assert torch.equal(torch.cat(drawn), t)
    weights = whole.per_sample / whole.squared_error
    assert bool(torch.allclose(weights, weights.mean())) == importance


def test_accumulating_micro_batches_gives_the_same_gradient(digits: str, runs: str) -> None:
    config = tiny(digits, runs, optimizer={"clip_norm": None})
    cut = config.model_copy(update={"workers": config.workers.model_copy(update={"micro_batch": 4})})
    for whole, pieces in zip(gradients(config, 0, 1)[0], gradients(cut, 0, 1)[0], strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-6)


def test_micro_batches_hold_every_sample_once_and_none_is_too_large(digits: str, runs: str) -> None:
    config = tiny(digits, runs)
    loader = Loader(config.data, load_index(digits), 0, 14)
    batch = next(iter(loader.batches(0, 1)))
    for size in range(1, 16):
        pieces = micro_batches(batch, size)
        assert max(len(piece.positions) for piece in pieces) <= size
        assert torch.equal(torch.cat([piece.positions for piece in pieces]), batch.positions)
        assert torch.equal(torch.cat([piece.images for piece in pieces]), batch.images)


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("size", [None, 1, 2, 3, 4])
def test_equal_micro_batches_hold_every_sample_once_and_repeat_the_last_where_one_is_missing(
    digits: str, runs: str, count: int, size: int | None
) -> None:
    config = tiny(digits, runs)
    batch = next(iter(Loader(config.data, load_index(digits), 0, count).batches(0, 1)))
    pieces = micro_batches(batch, size, share=5)  # of 14 samples over three workers
    assert len(pieces) == -(-5 // (size or 5))
    assert len({len(piece.positions) for piece in pieces}) == 1
    assert len(pieces[0].positions) <= (size or 5)
    real = [piece.positions[: len(piece.positions) - piece.padding] for piece in pieces]
    assert torch.equal(torch.cat(real), batch.positions)
    assert set(torch.cat([piece.positions for piece in pieces]).tolist()) == set(batch.positions.tolist())


def test_padding_changes_neither_gradient_nor_losses(digits: str, runs: str) -> None:
    config = tiny(digits, runs, optimizer={"clip_norm": None}, workers={"micro_batch": 4})
    plain, padded = (gradients(config, 0, 1, equal_sizes=equal) for equal in (False, True))
    for left, right in zip(plain[0], padded[0], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    plain[1].reduce()
    padded[1].reduce()
    (one, other) = (found[1].metrics(config.global_batch) for found in (plain, padded))
    for name in (name for name in one if name.startswith("train/")):
        assert other[name] == pytest.approx(one[name], rel=1e-5), name


def test_clipping_bounds_the_gradient_that_the_optimiser_sees(digits: str, runs: str) -> None:
    found, _ = gradients(tiny(digits, runs, optimizer={"clip_norm": 0.01}), 0, 1)
    assert math.sqrt(sum(float(g.square().sum()) for g in found)) == pytest.approx(0.01, rel=1e-3)


def test_a_step_with_an_infinite_gradient_changes_nothing_and_too_many_end_the_run(
    digits: str, runs: str
) -> None:
    config = tiny(digits, runs, max_skipped_steps=1)
    trainer, state = trainer_of(config)
    with torch.no_grad():
        state.net.head.bias.fill_(math.inf)
    before = {name: value.clone() for name, value in state.tensors().items()}
    window = StepMetrics(trainer.schedule.T, CPU)
    batches = Loader(config.data, load_index(digits), 0, config.global_batch).batches(0, 3)
    steps = trainer.steps(state, batches, window)
    assert next(steps) == 1
    assert (window.skipped_steps, state.skipped_steps) == (1, 1)
    assert all(torch.equal(value, before[name]) for name, value in state.tensors().items())
    with pytest.raises(NonFiniteError, match="not finite at 14 of its 14 positions: 14, 15, "):
        next(steps)


def test_of_a_step_that_is_not_finite_the_samples_at_fault_are_named(digits: str, runs: str) -> None:
    config = tiny(digits, runs, max_skipped_steps=0)
    labelled = config.net.model_copy(update={"null_class": False})
    config = config.model_copy(update={"net": labelled, "label_drop": 0.0})
    batch = next(iter(Loader(config.data, load_index(digits), 0, config.global_batch).batches(2, 3)))
    assert batch.labels is not None
    fault = int(batch.labels[3])
    for micro in (None, 4):
        trainer, state = trainer_of(config.model_copy(update={"workers": WorkerConfig(micro_batch=micro)}))
        state.step = 2
        with torch.no_grad():
            assert state.net.classes is not None
            state.net.classes.weight[fault] = math.nan
        wanted = batch.positions[batch.labels == fault].tolist()
        said = f"finite at {len(wanted)} of its 14 positions: {', '.join(map(str, wanted))};"
        with pytest.raises(NonFiniteError, match=said):
            next(trainer.steps(state, [batch], StepMetrics(trainer.schedule.T, CPU)))


def test_where_losses_are_finite_and_only_the_gradient_is_not_that_is_said(digits: str, runs: str) -> None:
    trainer, state = trainer_of(tiny(digits, runs, max_skipped_steps=0))
    state.net.head.bias.register_hook(lambda gradient: gradient * math.inf)
    batches = Loader(trainer.config.data, load_index(digits), 0, 14).batches(0, 1)
    with pytest.raises(
        NonFiniteError, match="each loss at positions 0 to 13 is finite, their gradient is not"
    ):
        next(trainer.steps(state, batches, StepMetrics(trainer.schedule.T, CPU)))


def test_samples_that_were_replaced_are_counted_and_named(
    digits: str, runs: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(digits, runs)
    trainer, state = trainer_of(config)
    batch = next(iter(Loader(config.data, load_index(digits), 0, config.global_batch).batches(0, 1)))
    window = StepMetrics(trainer.schedule.T, CPU)
    list(trainer.steps(state, [replace(batch, damage=("000001.tar, sample 7: torn",))], window))
    window.reduce()
    assert window.metrics(config.global_batch)["train/replaced_samples"] == 1.0
    assert "step 0: 000001.tar, sample 7: torn" in caplog.text


def run_alone(config: TrainConfig, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    """Train here and give back the tensors of the last checkpoint."""
    plan = plan_training(config)
    stop = threading.Event()

    def on_progress(step: int, total: int, note: str) -> None:
        if stop_at is not None and step >= stop_at:
            stop.set()

    initial = plan.initial.sha256 if plan.initial is not None else None
    if plan.initial is not None:
        stage_initial(plan.store, plan.initial)
    task = TrainTask(config, plan.identity, plan.store.uri, plan.index.digest, initial_sha256=initial)
    train_local(task, on_progress, stop)
    checkpoint = latest_checkpoint(plan.store)
    assert checkpoint is not None
    assert stop_at is not None or checkpoint.record.step == config.steps
    return checkpoint.tensors


@pytest.mark.parametrize("peak", [1e12, None])
def test_mfu_is_charted_where_the_peak_of_the_device_is_known(
    peak: float | None, digits: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    charted: list[dict[str, float]] = []
    monkeypatch.setattr(session, "device_peak_flops", lambda device, precision: peak)
    monkeypatch.setattr(RunLogger, "metrics", lambda self, step, values: charted.append(dict(values)))
    config = tiny(digits, runs, steps=6)
    run_alone(config)
    point = next(values for values in charted if "perf/images_per_s" in values)
    if peak is None:
        assert "perf/mfu" not in point
    else:
        expected = point["perf/images_per_s"] * sample_flops(config.net) / peak
        assert point["perf/mfu"] == pytest.approx(expected)


def test_the_loss_falls(digits: str, runs: str) -> None:
    seen: list[float] = []
    config = tiny(digits, runs, steps=60, global_batch=24)
    plan = plan_training(config)
    task = TrainTask(config, plan.identity, plan.store.uri, plan.index.digest)
    train_local(
        task, lambda s, t, note: seen.append(float(note.split()[1])) if note else None, threading.Event()
    )
    assert seen[-1] < 0.6 * seen[0]


@pytest.mark.parametrize("stop_at", [long(1), long(4), 9])
def test_a_training_stopped_anywhere_and_started_again_ends_in_the_same_bits(
    digits: str, runs: str, stop_at: int
) -> None:
    undisturbed = run_alone(tiny(digits, f"{runs}/a"))
    run_alone(tiny(digits, f"{runs}/b"), stop_at=stop_at)
    resumed = run_alone(tiny(digits, f"{runs}/b"))
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())


def test_a_window_cut_in_two_by_a_stop_gives_the_same_point() -> None:
    steps = [(torch.rand(6), torch.randint(0, 50, (6,))) for _ in range(5)]

    def filled(window: StepMetrics, part: list[tuple[torch.Tensor, torch.Tensor]]) -> StepMetrics:
        for losses, timesteps in part:
            window.open_step()
            window.add(losses, timesteps)
            window.close_step(float(losses.max()))
        window.reduce()
        return window

    whole = filled(StepMetrics(50, CPU), steps).metrics(6)
    first = filled(StepMetrics(50, CPU), steps[:2])
    second = StepMetrics(50, CPU)
    second.load(first.tensors(), leads=True)
    rest = filled(second, steps[2:]).metrics(6)
    for name, value in whole.items():
        if name.startswith("train/"):
            assert rest[name] == pytest.approx(value, rel=1e-12)


def test_every_rank_brings_as_many_values_to_a_window_cut_in_two() -> None:
    before = StepMetrics(50, CPU)
    for _ in range(3):
        before.open_step()
        before.add(torch.rand(4), torch.randint(0, 50, (4,)))
        before.close_step(1.0)
    leader, other = StepMetrics(50, CPU), StepMetrics(50, CPU)
    leader.load(before.tensors(), leads=True)
    other.load(before.tensors(), leads=False)
    assert len(leader._losses) == len(other._losses) == 3
    assert float(torch.stack(other._losses).sum()) == float(other._quartiles.sum()) == 0.0


def test_more_steps_go_on_where_a_constant_rate_training_ended(digits: str, runs: str) -> None:
    longer = run_alone(tiny(digits, f"{runs}/a"))
    run_alone(tiny(digits, f"{runs}/b", steps=16))
    extended = run_alone(tiny(digits, f"{runs}/b"))
    assert all(torch.equal(value, extended[name]) for name, value in longer.items())


def test_fewer_steps_than_are_trained_are_refused(digits: str, runs: str) -> None:
    run_alone(tiny(digits, runs))
    with pytest.raises(UserError, match="already at step 24"):
        plan_training(tiny(digits, runs, steps=16))


def test_settings_that_do_not_fit_the_data_are_refused_by_name(digits: str, runs: str) -> None:
    good = tiny(digits, runs)
    for field, value in [("image_size", 16), ("num_classes", 3), ("in_channels", 3)]:
        net = good.net.model_dump() | {field: value} | ({"out_channels": 3} if field == "in_channels" else {})
        with pytest.raises(UserError, match=rf"train\.net\.{field}"):
            plan_training(tiny(digits, runs, net=net))
    with pytest.raises(UserError, match=r"index\.json"):
        plan_training(tiny(digits + "-absent", runs))


def test_a_batch_of_noise_is_named_by_position_not_by_the_batch_it_comes_in(digits: str, runs: str) -> None:
    config = tiny(digits, runs)
    trainer, state = trainer_of(config)
    batch = next(iter(Loader(config.data, load_index(digits), 0, 14).batches(0, 1)))
    state.net.train()
    with torch.no_grad():
        for parameter in state.net.parameters():
            parameter.add_(0.05)
        together, t = chunk_loss(trainer, batch)
        one = replace(
            batch,
            positions=batch.positions[5:6],
            images=batch.images[5:6],
            labels=batch.labels[5:6],  # type: ignore[index]
        )
        alone, t_alone = chunk_loss(trainer, one)
    assert t_alone.item() == t[5].item()
    torch.testing.assert_close(alone.per_sample[0], together.per_sample[5], rtol=1e-5, atol=1e-6)

"""The modes that make a step fast are really on, and change what they should: speed, and last bits at most."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ddpm_pipeline.config.training import OptimizerConfig, TrainConfig, WorkerConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.reading.loader import Batch, Loader
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.train.loop import Trainer, chunk_loss, train_step
from ddpm_pipeline.train.state import TrainState, initial_state, make_optimizer
from ddpm_pipeline.train.step_metrics import StepMetrics
from tests.train.test_loop import run_alone
from tests.train.tiny import tiny

CPU = torch.device("cpu")


def begun(config: TrainConfig) -> tuple[Trainer, TrainState, Batch]:
    """A training before a step, its outputs moved off zero so that every gradient is there."""
    state = initial_state(config, CPU)
    with torch.no_grad():
        for parameter in state.net.parameters():
            parameter.add_(0.05)
    trainer = Trainer(config, NoiseSchedule.from_config(config.schedule), state.net, CPU, 1)
    loader = Loader(config.data, load_index(config.data.uri), config.seed, config.global_batch)
    return trainer, state, next(iter(loader.batches(0, 1)))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("micro_batch", "pieces"), [(None, 1), (7, 2), (3, 5)])
def test_gradients_are_exchanged_once_a_step_however_many_pieces_it_has(
    digits: str, runs: str, micro_batch: int | None, pieces: int
) -> None:
    config = tiny(digits, runs, workers={"micro_batch": micro_batch})
    trainer, state, batch = begun(config)
    shared = DistributedDataParallel(state.net, init_sync=False)
    exchanges: list[int] = []
    passes: list[int] = []

    def exchange(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanges.append(bucket.index())
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    shared.register_comm_hook(None, exchange)
    state.net.register_forward_pre_hook(lambda *_: passes.append(1))
    sharing = Trainer(config, trainer.schedule, shared, CPU, 1)
    train_step(sharing, state, batch, StepMetrics(50, CPU))
    assert len(passes) == pieces
    assert len(exchanges) == len(set(exchanges)) > 0


def test_weights_gradients_and_moments_lie_channels_last(digits: str, runs: str) -> None:
    trainer, state, batch = begun(tiny(digits, runs))
    seen: list[bool] = []
    state.net.stem.register_forward_hook(
        lambda _, given, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    train_step(trainer, state, batch, StepMetrics(50, CPU))
    weight = next(block for block in state.net.modules() if isinstance(block, torch.nn.Conv2d)).weight
    assert seen == [True]
    for tensor in (weight, state.optimizer.state[weight]["exp_avg"]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert weight.stride() == state.optimizer.state[weight]["exp_avg_sq"].stride()


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_optimiser_is_fused_and_steps_as_the_plain_one(kind: str) -> None:
    config = OptimizerConfig(kind=kind, lr=0.1, weight_decay=0.1, betas=(0.8, 0.9))  # type: ignore[arg-type]
    plain_kind = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
    ours, plain = (torch.nn.Linear(5, 3) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    fused = make_optimizer(ours, config)
    other = plain_kind(plain.parameters(), lr=0.1, weight_decay=0.1, betas=(0.8, 0.9), foreach=False)
    assert all(group["fused"] for group in fused.param_groups)
    for step in range(5):
        for net, optimizer in ((ours, fused), (plain, other)):
            optimizer.zero_grad()
            net(torch.full((2, 5), float(step))).square().sum().backward()
            optimizer.step()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_the_networks_alone_noise_loss_and_weights_stay_float32(digits: str, runs: str) -> None:
    config = tiny(digits, runs, precision="bfloat16")
    trainer, state, batch = begun(config)
    inside: list[torch.dtype] = []
    given: list[torch.dtype] = []
    state.net.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0].dtype))
    state.net.stem.register_forward_hook(lambda _, arguments, out: inside.append(out.dtype))
    terms, _ = chunk_loss(trainer, batch)
    terms.per_sample.sum().backward()
    assert (given, inside) == ([torch.float32], [torch.bfloat16])
    assert terms.per_sample.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in state.net.parameters() if p.grad is not None)
    plain, _, _ = begun(tiny(digits, runs))
    exact = chunk_loss(plain, batch)[0].per_sample
    assert not torch.equal(terms.per_sample, exact)
    torch.testing.assert_close(terms.per_sample, exact, rtol=0.05, atol=0.05)


def test_a_training_in_bfloat16_learns_and_goes_on_in_the_same_bits(digits: str, runs: str) -> None:
    whole = run_alone(tiny(digits, f"{runs}/a", precision="bfloat16"))
    run_alone(tiny(digits, f"{runs}/b", precision="bfloat16"), stop_at=9)
    resumed = run_alone(tiny(digits, f"{runs}/b", precision="bfloat16"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert whole["net/stem.weight"].dtype == torch.float32


@pytest.mark.long
def test_a_training_whose_micro_batches_come_out_uneven_compiles_one_graph(
    digits: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[list[torch.Size]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        graphs.append(
            [given.shape for given in inputs if isinstance(given, torch.Tensor) and given.ndim == 4]
        )
        return graph.forward

    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: plain(net, backend=backend))
    run_alone(tiny(digits, runs, steps=6, compile=True, workers={"micro_batch": 4}))
    assert len(graphs) == 1, "4, 4, 3 and 3 samples would be compiled twice, the second time for any number"
    assert (4, 1, 8, 8) in graphs[0]


def test_a_compiled_network_is_called_compiled_and_stays_the_same_module(
    digits: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []

    def plain(self: torch.nn.Module, *_: object, **__: object) -> None:
        compiled.append(self)  # what the compiler makes of it is torch's; that it is asked to is ours

    monkeypatch.setattr(torch.nn.Module, "compile", plain)
    config = tiny(digits, f"{runs}/a", steps=8)
    eager = run_alone(config)
    assert compiled == []
    fast = run_alone(tiny(digits, f"{runs}/b", steps=8, compile=True))
    assert len(compiled) == 1
    assert eager.keys() == fast.keys(), "a checkpoint must not know whether the network was compiled"
    assert config.digest("d") == config.model_copy(update={"compile": True}).digest("d")


def test_clipping_is_of_the_whole_batch_not_of_its_pieces(digits: str, runs: str) -> None:
    norms = []
    for micro in (None, 3):
        config = tiny(digits, runs, optimizer={"clip_norm": 1e-3})
        trainer, state, batch = begun(config.model_copy(update={"workers": WorkerConfig(micro_batch=micro)}))
        norms.append(train_step(trainer, state, batch, StepMetrics(50, CPU)))
    assert norms[0] > 1e-3
    assert math.isclose(norms[0], norms[1], rel_tol=1e-3)

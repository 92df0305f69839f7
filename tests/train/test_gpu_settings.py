"""Settings of a training on GPUs: what is refused, what names the training, and what every worker does first."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train.torch
import torch
from pydantic import ValidationError
from torch import nn

from ddpm_pipeline import devices
from ddpm_pipeline.config.device_kind import DeviceKind
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.nets import UNet
from ddpm_pipeline.store import open_store
from ddpm_pipeline.train import checkpoint_eval, rendezvous, session, worker
from ddpm_pipeline.train.checkpoint import Checkpoint, Record, TrainingDevice, load_record, save_checkpoint
from ddpm_pipeline.train.checkpoint_eval import draw_grid
from ddpm_pipeline.train.loop import Trainer
from ddpm_pipeline.train.memory import limit_device_memory
from ddpm_pipeline.train.rendezvous import refuse_mixed_kinds
from ddpm_pipeline.train.training_plan import plan_training
from ddpm_pipeline.train.worker import device_tags
from tests.train.test_loop import run_alone, trainer_of
from tests.train.tiny import tiny

DATA_DIGEST = "0" * 64
H100 = DeviceKind(name="NVIDIA H100", capability="9.0", torch="2.13.0+cu130", cuda="13.0", cudnn="91300")
A100 = H100.model_copy(update={"name": "NVIDIA A100", "capability": "8.0"})


def of(**changes: object) -> TrainConfig:
    return tiny("file:///data", "file:///runs", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matmul": "tf32"}, "matmul has no effect while workers.gpus_per_worker is 0; leave it out"),
        ({"deterministic": False}, "deterministic has no effect while workers.gpus_per_worker is 0"),
        (
            {"matmul": "tf32", "precision": "bfloat16", "workers": {"gpus_per_worker": 1}},
            "matmul has no effect with precision bfloat16",
        ),
        ({"precision": "float16"}, 'use "bfloat16"'),
        ({"workers": {"gpus_per_worker": 0.5, "num_workers": 2}}, "NCCL needs a whole GPU for each"),
        ({"workers": {"gpus_per_worker": 0.5, "num_workers": [1, 2]}}, "NCCL needs a whole GPU for each"),
        ({"workers": {"gpus_per_worker": 1.5}}, "a worker computes on one GPU and the rest would idle"),
        ({"workers": {"gpus_per_worker": 2}}, "set it to 1, and num_workers to the number of GPUs"),
    ],
)
def test_what_a_gpu_cannot_do_or_has_no_effect_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        of(**changes)
    assert message in str(caught.value)


def test_a_part_of_a_gpu_for_one_worker_is_accepted() -> None:
    assert of(workers={"gpus_per_worker": 0.5}).workers.gpus_per_worker == 0.5


def test_only_rounding_of_inputs_names_another_training() -> None:
    gpu = {"gpus_per_worker": 1}
    before_there_were_these_settings = "9f8ae8baa555"
    digests = {
        name: of(workers=gpu, **changes).digest(DATA_DIGEST)
        for name, changes in {
            "default": {},
            "any algorithm": {"deterministic": False},
            "tf32": {"matmul": "tf32"},
        }.items()
    }
    assert of().digest(DATA_DIGEST) == digests["default"] == before_there_were_these_settings
    assert digests["any algorithm"] == digests["default"]
    assert digests["tf32"] != digests["default"]


def test_a_worker_sets_up_arithmetic_before_its_first_cuda_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def noted(name: object, answer: object = None) -> Callable[..., object]:
        return lambda *_, **__: calls.append(name) or answer

    monkeypatch.setattr(
        devices, "set_up_arithmetic", lambda matmul, deterministic: calls.append((matmul, deterministic))
    )
    monkeypatch.setattr(torch.cuda, "is_available", noted("cuda", True))
    monkeypatch.setattr(rendezvous.ray.util, "get_node_ip_address", lambda: "10.77.0.3")
    monkeypatch.setattr(rendezvous, "use_interface", lambda address: None)
    monkeypatch.setattr(rendezvous.ray.train, "get_context", _Context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(devices, "read_device_kind", noted("kind", H100))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        monkeypatch.setenv(name, "")
    kind = rendezvous._prepare(gpus=True, matmul="tf32", deterministic=False)
    assert kind == H100
    assert calls == [("tf32", False), "cuda", "kind"]


class _Context:
    def get_world_rank(self) -> int:
        return 1

    get_local_rank = get_world_rank

    def get_world_size(self) -> int:
        return 2


def test_a_training_in_this_process_sets_up_arithmetic_first(
    digits: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(
        worker, "set_up_arithmetic", lambda matmul, deterministic: calls.append((matmul, deterministic))
    )
    monkeypatch.setattr(worker, "train_worker", lambda *_: calls.append("worker"))
    config = tiny(digits, runs)
    worker.train_local(worker.TrainTask(config, "", "", ""), lambda *_: None, None)  # type: ignore[arg-type]
    assert calls == [("ieee", True), "worker"]


def test_workers_with_several_kinds_of_gpu_are_refused_in_one_line() -> None:
    refuse_mixed_kinds([H100, H100])
    refuse_mixed_kinds([None, None])
    with pytest.raises(
        UserError, match=r"^train\.workers: rank 0 has NVIDIA H100 [^\n]*rank 2 has NVIDIA A100[^\n]*$"
    ):
        refuse_mixed_kinds([H100, H100, A100])


@pytest.mark.parametrize(("part", "limits"), [(0.5, [0.5]), (1, [])])
def test_a_worker_with_a_part_of_a_gpu_stays_within_that_part_of_its_memory(
    part: float, limits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: seen.append(share)
    )
    workers = of(workers={"gpus_per_worker": part}).workers
    limit_device_memory(workers, torch.device("cuda"))
    limit_device_memory(of().workers, torch.device("cpu"))
    assert seen == limits


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (worker, "initial_state"),
        (worker, "_warm_up"),
        (session, "draw_grid"),
        (checkpoint_eval, "training_loss"),
    ],
)
def test_a_lack_of_memory_in_any_part_is_one_line_that_names_the_setting(
    place: object, name: str, digits: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED\nmore lines")

    monkeypatch.setattr(place, name, full)
    wanted = r"^train\.workers\.micro_batch: 14 samples [^\n]*CUDNN_STATUS_ALLOC_FAILED\)[^\n]*micro_batch=7[^\n]*$"
    with pytest.raises(UserError, match=wanted):
        run_alone(tiny(digits, runs))


def test_other_errors_of_a_worker_are_not_taken_for_a_lack_of_memory(
    digits: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(session, "draw_grid", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_alone(tiny(digits, runs))


def test_a_grid_is_drawn_in_parts_of_a_micro_batch(
    digits: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    sample = checkpoint_eval.sample

    def watched(*given: Any, **named: Any) -> torch.Tensor:
        sizes.append(len(given[3]))
        return sample(*given, **named)

    monkeypatch.setattr(checkpoint_eval, "sample", watched)
    whole, state = trainer_of(tiny(digits, runs))
    expected = draw_grid(whole, state)
    assert sizes == [10]
    parts, state = trainer_of(tiny(digits, runs, workers={"micro_batch": 4}))
    found = draw_grid(parts, state)
    assert sizes == [10, 4, 4, 2]
    assert np.abs(expected.astype(int) - found).max() <= 1
    large, state = trainer_of(tiny(digits, runs, workers={"micro_batch": 64}))
    assert np.array_equal(draw_grid(large, state), expected)
    assert sizes[4:] == [10]


def test_on_a_gpu_a_grid_is_no_larger_than_a_workers_share() -> None:
    config = of(workers={"gpus_per_worker": 1, "num_workers": 2})
    trainer = Trainer(
        config, NoiseSchedule.from_config(config.schedule), nn.Identity(), torch.device("cuda"), 2
    )
    assert checkpoint_eval._grid_part(trainer) == 7


def test_a_grid_is_computed_in_the_training_s_precision(digits: str, runs: str) -> None:
    trainer, state = trainer_of(tiny(digits, runs, precision="bfloat16"))
    dtypes: set[torch.dtype] = set()
    averaged = state.averaged

    def watched() -> UNet:
        net = averaged()
        net.head.register_forward_hook(lambda module, given, output: dtypes.add(output.dtype))
        return net

    state.averaged = watched  # type: ignore[method-assign]
    draw_grid(trainer, state)
    assert dtypes == {torch.bfloat16}


ON_H100 = TrainingDevice(kind=H100, matmul="ieee", deterministic=True)


def test_a_checkpoint_says_what_computed_it_and_a_cpus_record_is_as_before(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    tensors = {"net/x": torch.ones(2)}
    save_checkpoint(store, 1, tensors, "a")
    save_checkpoint(store, 2, tensors, "a", None, ON_H100)
    keys = set(json.loads(store.read("checkpoints/000000000001/record.json")))
    assert keys == {"step", "sha256", "size_bytes", "identity", "eval_loss"}
    assert load_record(store, 1).device is None
    assert load_record(store, 2).device == ON_H100


def test_a_training_on_a_gpu_records_it(digits: str, runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "read_device_kind", lambda device: H100)
    config = tiny(digits, runs)
    run_alone(config)
    assert load_record(plan_training(config).store, config.steps).device == ON_H100


def resumed_from(device: TrainingDevice | None) -> Checkpoint:
    return Checkpoint(Record(step=8, sha256="0" * 64, size_bytes=1, identity="a", device=device), {})


def test_the_run_says_what_computes_it(caplog: pytest.LogCaptureFixture) -> None:
    assert device_tags(None, None) == {"ddpm.device": "CPU", "ddpm.deterministic": "true"}
    expected = {"ddpm.device": str(H100), "ddpm.deterministic": "true", "ddpm.matmul": "ieee"}
    assert device_tags(ON_H100, None) == device_tags(ON_H100, resumed_from(ON_H100)) == expected
    assert not caplog.text


@pytest.mark.parametrize("before", [None, ON_H100.model_copy(update={"kind": A100})])
def test_resuming_on_another_kind_of_device_warns_and_is_noted(
    before: TrainingDevice | None, caplog: pytest.LogCaptureFixture
) -> None:
    change = device_tags(ON_H100, resumed_from(before))["ddpm.device_change"]
    assert change == f"step 8: from {before or 'CPU'} to {H100}"
    assert [record.getMessage() for record in caplog.records if change in record.getMessage()]
    assert "\n" not in caplog.records[0].getMessage()


def test_a_training_that_was_not_deterministic_once_is_so_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "read_device_kind", lambda device: H100)
    free = ON_H100.model_copy(update={"deterministic": False})
    for before, expected in ((None, True), (ON_H100, True), (free, False)):
        found = worker.training_device(of(), torch.device("cuda"), resumed_from(before))
        assert found is not None
        assert found.deterministic is expected

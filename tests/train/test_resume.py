"""Going on costs the same wherever a training stands: the place in the data is arithmetic."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.reading.order import GlobalOrder
from ddpm_pipeline.data.reading.shard_access import FileAccess
from ddpm_pipeline.store import FileStore
from ddpm_pipeline.train.checkpoint import latest_checkpoint, save_checkpoint
from ddpm_pipeline.train.training_plan import plan_training
from ddpm_pipeline.train.worker import TrainTask, train_local
from tests.train.tiny import tiny

STORE = ("read", "read_range", "open", "stat", "write", "upload", "download", "list", "delete")


def run(config: TrainConfig) -> None:
    plan = plan_training(config)
    train_local(
        TrainTask(config, plan.identity, plan.store.uri, plan.index.digest),
        lambda *_: None,
        threading.Event(),
    )


def counted(work: Callable[[], None]) -> Counter[str]:
    """How often `work` asks the store, reads samples and computes a permutation."""
    count: Counter[str] = Counter()

    def watch(patch: pytest.MonkeyPatch, kind: type, name: str, size: Callable[..., int]) -> None:
        original = getattr(kind, name)

        def watched(self: Any, *words: Any, **named: Any) -> Any:
            count[f"{kind.__name__}.{name}"] += size(*words)
            return original(self, *words, **named)

        patch.setattr(kind, name, watched)

    with pytest.MonkeyPatch.context() as patch:
        for name in STORE:
            watch(patch, FileStore, name, lambda *_: 1)
        watch(patch, FileAccess, "read_each", lambda shard, offsets, sizes: len(offsets))
        watch(patch, FileAccess, "read", lambda *_: 1)
        watch(patch, GlobalOrder, "_make_window", lambda *_: 1)
        work()
    return count


def test_resuming_at_step_a_million_does_the_same_work_as_at_step_twelve(digits: str, runs: str) -> None:
    first = tiny(digits, f"{runs}/first", steps=1, optimizer={"lr": 2e-3})
    run(first)
    start = latest_checkpoint(plan_training(first).store)
    assert start is not None
    work: dict[int, Counter[str]] = {}
    for step in (12, 1_000_000):
        config = first.model_copy(update={"runs": f"{runs}/{step}", "steps": step + 3})
        store = plan_training(config).store
        save_checkpoint(store, step, start.tensors, start.record.identity)
        work[step] = counted(lambda config=config: run(config))
        end = latest_checkpoint(store)
        assert end is not None
        assert end.record.step == step + 3
    assert work[12] == work[1_000_000]
    assert work[12]["GlobalOrder._make_window"] >= 1
    assert work[12]["FileAccess.read_each"] + work[12]["FileAccess.read"] >= 3 * first.global_batch

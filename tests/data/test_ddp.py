"""Real DDP: processes with gloo, on data that no number of them divides."""

import multiprocessing
import os
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ddpm_pipeline.config.data import DataConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.reading.loader import Loader
from tests.data.making import digits
from tests.effort import long

BATCH = 7
STEPS = 1797 // BATCH + 2  # past the end of the epoch, which lies inside a batch


def train(uri: str, rank: int, world: int, meeting: str | None) -> torch.Tensor:
    """One epoch of a linear model; its weights at the end."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: torch.nn.Module = torch.nn.Linear(64, 10)
    if meeting is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = Loader(DataConfig(uri=uri, window_shards=3), load_index(uri, check=False), 0, BATCH, rank, world)
    for batch in loader.batches(0, STEPS):
        assert batch.labels is not None
        guessed = model(batch.images.float().flatten(1) / 255)
        loss = torch.nn.functional.cross_entropy(guessed, batch.labels)
        optimizer.zero_grad()
        (loss * len(batch.labels) * world / BATCH).backward()
        optimizer.step()
    if meeting is not None:
        dist.destroy_process_group()
    return torch.cat([each.detach().flatten() for each in model.parameters()])


def one_rank(
    uri: str, rank: int, world: int, meeting: str, answers: "SimpleQueue[tuple[int, list[float]]]"
) -> None:
    answers.put((rank, train(uri, rank, world, meeting).tolist()))


@pytest.mark.parametrize("world", [3, long(5)])
def test_several_ranks_train_on_1797_samples_with_batch_7_to_the_end_and_as_one_would(
    uri: str, tmp_path: Path, world: int
) -> None:
    digits(uri)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.data.test_ddp"])
    answers: SimpleQueue[tuple[int, list[float]]] = context.SimpleQueue()
    meeting = (tmp_path / "meeting").as_uri()
    ranks = [
        context.Process(target=one_rank, args=(uri, rank, world, meeting, answers)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(120)  # seconds on an idle machine; a hang would be for ever
        assert [process.exitcode for process in ranks] == [0] * world
    finally:
        for process in ranks:
            process.kill()
    found = dict(answers.get() for _ in ranks)
    assert all(found[rank] == found[0] for rank in range(world))
    alone = train(uri, 0, 1, None)
    torch.testing.assert_close(torch.tensor(found[0]), alone, rtol=1e-4, atol=1e-5)

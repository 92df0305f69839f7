"""A compiled network: the same bytes from every worker, and code that only the first one makes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.generate.tiny import settings, tiny_model

WORKER = """
import sys
from pathlib import Path
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.generate.engine import set_up_torch
from ddpm_pipeline.generate.plan import shard
from tests.generate.tiny import writer_of, plan_of
config = GenerateConfig.model_validate_json(Path(sys.argv[1]).read_text())
set_up_torch(plan_of(config)[0])
writer = writer_of(config)
print(writer.write(shard(writer.generation.spec, 0)).record.sha256)
"""


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.timeout(900)  # a compiler runs for most of a minute, longer beside other work
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_two_workers_that_compile_make_the_same_bytes_and_the_second_compiles_nothing(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    cache = tmp_path / "cache" / "ddpm-pipeline" / "compiled"

    def work(name: str) -> tuple[str, set[Path]]:
        config = settings(model, (tmp_path / name).as_uri(), compile=True, shard_size=4)
        order = tmp_path / f"{name}.json"
        order.write_text(config.model_dump_json())
        environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
        environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.getcwd()}
        done = subprocess.run(
            [sys.executable, "-c", WORKER, str(order)], env=environment, check=True, stdout=subprocess.PIPE
        )
        return done.stdout.decode().split()[-1], set(cache.rglob("*.so"))

    first, made = work("first")
    second, still = work("second")
    assert first == second
    assert made
    assert still == made

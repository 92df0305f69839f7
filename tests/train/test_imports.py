"""What the processes of a training load before they work: packages take longer than the processes to start."""

# pyright: reportPrivateUsage=false

import subprocess
import sys

import pytest
from ray.train.torch import TorchTrainer

from ddpm_pipeline.train.ray_trainer import UNUSED_CALLBACKS, _LeanTrainer
from ddpm_pipeline.train.rendezvous import Rendezvous

COMPILER = {"torch._dynamo", "sympy"}
SIZE_OF_A_NETWORK = """
import torch
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.nets import build_net
with torch.device("meta"):
    build_net(UNetConfig(base_channels=8, norm_groups=4, num_classes=3))
"""
AVERAGES = """
import torch
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.nets import ConstantEMA, build_net
from ddpm_pipeline.train.state import averaged_network
from types import SimpleNamespace
from ddpm_pipeline.config.training import EMAConfig
config = SimpleNamespace(net=UNetConfig(base_channels=8, norm_groups=4), ema=EMAConfig())
net = build_net(config.net)
tensors = {f"net/{name}": value for name, value in net.state_dict().items()}
tensors |= {f"ema/{name}": value for name, value in ConstantEMA(net, 0.9).state_dict().items()}
averaged_network(config, 1, tensors)
"""


def modules(code: str) -> set[str]:
    """Modules that a program has imported by its end."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_what_computes_nothing_loads_no_torch() -> None:
    loaded = modules("from ddpm_pipeline.train import train_coordinator, rendezvous, train_task, rank_watch")
    assert loaded & {"torch", "mlflow", "boto3", "ddpm_pipeline.train.worker"} == set()


@pytest.mark.parametrize("code", [SIZE_OF_A_NETWORK, AVERAGES], ids=["size", "averages"])
def test_a_network_that_is_not_compiled_loads_no_compiler(code: str) -> None:
    loaded = modules(code)
    assert "torch" in loaded
    assert loaded & COMPILER == set()


def test_drivers_and_workers_load_neither_compiler_nor_fsdp_before_they_need_it() -> None:
    loaded = modules(
        "import ddpm_pipeline.train.training_driver, ddpm_pipeline.train.worker, ddpm_pipeline.generate.sample_worker"
    )
    assert loaded & {*COMPILER, "torch.distributed.fsdp", "torch.distributed.tensor", "mlflow"} == set()


def test_ray_train_starts_no_actor_that_nothing_uses() -> None:
    names = [
        {type(one).__name__ for one in kind(print, torch_config=Rendezvous(1))._create_default_callbacks()}  # type: ignore[arg-type]
        for kind in (TorchTrainer, _LeanTrainer)
    ]
    assert names[0] - names[1] == set(UNUSED_CALLBACKS)

"""What a training consists of between two steps, and its tensors by name.

There is no generator state in it: every random number is named by seed and position, so the step is all that the
future depends on.
"""

import copy
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm_pipeline.config.training import EMAConfig, OptimizerConfig, TrainConfig
from ddpm_pipeline.data.reading.loader import Batch
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.nets import ConstantEMA, PowerEMA, WeightAverage, build_net, seeded_init
from ddpm_pipeline.train.data_parallel import divides_state, exchanged_weights, is_divided, part_of, shard

FOLDERS = ("net/", "ema/", "optimizer/")
"""Beginnings of the names of a state's tensors; a checkpoint holds others beside them."""


@dataclass(frozen=True)
class UnreadStep:
    """A step whose gradient norm the host has not read yet: the averages and the counts do not hold it."""

    step: int
    """Steps finished before it."""
    batch: Batch
    norm: Tensor
    """Of the global gradient: on the CPU, once `copied`."""
    copied: torch.cuda.Event | None
    """None for a training on the CPU, where nothing has to be copied."""


@dataclass
class TrainState:
    """Network, its averages, the optimiser, and the count of finished steps."""

    net: nn.Module
    ema: WeightAverage
    """The averages; the first of them is what samples, eval/loss and the exported model are of."""
    optimizer: torch.optim.Optimizer
    step: int = 0
    skipped_steps: int = 0
    """Steps whose gradient was not finite, in this process's life."""
    unread: UnreadStep | None = None
    """On a GPU the newest step, whose norm is read while the next one runs, so that neither waits for the other."""
    read_until: torch.cuda.Event | None = None
    """Until then the tensors are being copied to the host, and must not change."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the network, without a walk through its modules, which would take a millisecond of each step."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name: `net/…`, `ema/<average>/…`, `optimizer/<parameter>/<quantity>`. Not copies."""
        self._require_read()
        out = {f"net/{name}": value for name, value in self.net.state_dict().items()}
        out |= {f"ema/{name}": value for name, value in self.ema.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            for quantity, value in self.optimizer.state.get(parameter, {}).items():
                out[f"optimizer/{name}/{quantity}"] = value
        return out

    def load(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Take over a checkpoint. Raises DamageError when it is of another network."""
        with _fitting(step):
            self._load(step, tensors)

    def _load(self, step: int, tensors: dict[str, Tensor]) -> None:
        parameters = dict(self.net.named_parameters())

        def own(values: dict[str, Tensor]) -> dict[str, Tensor]:
            """This worker's parts, of values named `[<average>/]<parameter>`."""
            names = {name: name.rpartition("/")[2] for name in values}
            return {
                name: part_of(value, parameters[names[name]]) if names[name] in parameters else value
                for name, value in values.items()
            }

        self.net.load_state_dict(own(_below("net/", tensors)))
        self.ema.load_state_dict(own(_below("ema/", tensors)))
        moments = _below("optimizer/", tensors)
        known = self.optimizer.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for i, (name, parameter) in enumerate(self.net.named_parameters()):
            state[i] = {
                quantity: _arranged_like(parameter, value)
                for quantity, value in _below(f"{name}/", moments).items()
            }
        self.optimizer.load_state_dict(
            {"state": state if step else {}, "param_groups": known["param_groups"]}
        )
        self.step = step

    def averaged(self) -> nn.Module:
        """A network of its own with the first average's weights, for sampling; this one is left as it is."""
        self._require_read()
        net = copy.deepcopy(self.net)
        self.ema.copy_to(net)
        return net.eval()

    def _require_read(self) -> None:
        if self.unread is not None:
            raise RuntimeError("the newest step is not in the averages: call Trainer.finish_step first")

    @contextmanager
    def average(self) -> Generator[nn.Module]:
        """A network with the first average's weights, for sampling: a copy, or, where several workers have parts of it,
        the network itself with other weights meanwhile. Then all workers must call this and compute the same.
        """
        if is_divided(self.net):
            with exchanged_weights(self.net, self.ema.weights()):
                yield self.net
        else:
            yield self.averaged()


def initial_state(
    config: TrainConfig, device: torch.device, weights: Mapping[str, Tensor] | None = None, world: int = 1
) -> TrainState:
    """The state before the first step, a pure function of the settings and, in fine-tuning, of `weights`.

    `world`: workers in the group. Where they divide the state, this is this worker's part, and a collective call.
    """
    net = seeded_init(config.net, config.seed)
    if weights is not None:
        net.load_state_dict(weights)
    if divides_state(config.workers, world):
        shard(net, config.workers, device)  # FSDP takes weights in row-major order only
    else:
        net.to(device)
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stub lacks this form
    return TrainState(net, make_average(net, config.ema), make_optimizer(net, config.optimizer))


def averaged_network(config: TrainConfig, step: int, tensors: dict[str, Tensor]) -> tuple[nn.Module, str]:
    """The network of a checkpoint with its first average, on the CPU, and the name of that average.

    Without the optimizer, whose first one in a process imports torch's compiler: more than a second. Raises DamageError
    when the checkpoint is of another network.
    """
    net = build_net(config.net)
    average = make_average(net, config.ema)
    with _fitting(step):
        net.load_state_dict(_below("net/", tensors))
        average.load_state_dict(_below("ema/", tensors))
    average.copy_to(net)
    return net.eval(), average.tracks[0]


@contextmanager
def _fitting(step: int) -> Generator[None]:
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DamageError(f"checkpoint {step} does not fit this network: {reason}") from error


def make_average(net: nn.Module, config: EMAConfig) -> WeightAverage:
    """The averages that the settings ask for, beginning with the weights of `net`."""
    if config.kind == "power":
        return PowerEMA(net, config.widths)
    return ConstantEMA(net, config.decay, warmup=config.warmup)


def make_optimizer(net: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam or AdamW in its fused form: one pass over memory a step."""
    kind = torch.optim.Adam if config.kind == "adam" else torch.optim.AdamW
    return kind(
        net.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of the step that takes the count of finished steps from `step` to `step + 1`.

    Linear warm-up (Ho et al. 2020, appendix B: 5,000 steps), then constant, or a half cosine or a line to 0 at
    `num_steps`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "none":
        return config.lr
    course = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * course)) if config.decay == "cosine" else 1 - course
    return config.lr * left


def _arranged_like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` in the memory layout of its parameter: the fused kernel walks both as flat arrays."""
    if value.shape != parameter.shape:
        return value.clone()  # a count of steps
    return torch.empty_like(parameter).copy_(part_of(value, parameter))


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

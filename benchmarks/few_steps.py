"""What a distilled model saves: whole shards by a guided teacher and by its student, `python -m benchmarks.few_steps`.

Each shard is sampled, encoded, packed and stored in a local folder, in one thread. The teacher takes 20 steps of
DPM-Solver++ with guidance, which are 40 evaluations of the network an image; the student takes one, two and four. Two
networks with random weights, whose images are as dear as any: that of the preset `digits`, and one for 32x32 colour
images. The teacher and the students take turns in one process.
"""

import tempfile
from pathlib import Path

import torch

from benchmarks.common import add_output_options, compare, machine, plain_parser, publish, take_turns
from benchmarks.generate import shard_maker
from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, ScheduleConfig
from ddpm_pipeline.config.generation import GenerateConfig, GuardConfig
from ddpm_pipeline.config.model_card import DistillationInfo, ImageShape, ModelCard
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.config.settings_files import read_yaml
from ddpm_pipeline.jobs.runner import preset_file
from ddpm_pipeline.nets import parameter_count
from ddpm_pipeline.nets.build import seeded_init
from ddpm_pipeline.nets.model_files import save_model

TEACHER = SamplerConfig(kind="dpm++2m", num_steps=20, guidance_scale=1.25)
STUDENT_STEPS = (1, 2, 4)
SHARD = {"digits": 125, "colour": 8}
"""Images of a shard, sampled together, by network."""


def main() -> int:
    """Measure both networks and publish the numbers."""
    parser = plain_parser("few_steps", __doc__)
    parser.add_argument("--rounds", type=int, default=5)
    add_output_options(parser)
    told = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, object] = dict(machine())
    for name, net in networks().items():
        with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as scratch:
            found |= {
                f"{name}_{fact}": value
                for fact, value in measure(Path(scratch), net, SHARD[name], told.rounds).items()
            }
    publish(found, told)
    return 0


def networks() -> dict[str, UNetConfig]:
    """The networks to measure, by name."""
    digits = UNetConfig.model_validate(read_yaml(preset_file("digits"))["train"]["net"])
    colour = UNetConfig(
        image_size=32,
        base_channels=64,
        multipliers=(1, 2, 2),
        attention_resolutions=(16,),
        num_classes=10,
        null_class=True,
    )
    return {"digits": digits, "colour": colour}


def measure(folder: Path, net: UNetConfig, batch: int, rounds: int) -> dict[str, object]:
    """Images per CPU second of each, and how many times the teacher's rate each student reaches."""
    teacher, student = folder / "teacher", folder / "student"
    card = ModelCard(
        net=net,
        schedule=ScheduleConfig(kind="cosine"),
        objective=ObjectiveConfig(target="v"),
        image=ImageShape(channels=net.in_channels, size=net.image_size),
    )
    network = seeded_init(net, 0)
    weights = network.state_dict()
    saved = save_model(teacher, weights, card)
    taught = DistillationInfo(
        teacher="teacher/1", teacher_sha256=saved.weights.sha256, method="none", sampler=TEACHER, steps=0
    )
    save_model(student, weights, card.model_copy(update={"distillation": taught}))
    contenders = {"teacher": shard_maker(_config(folder, "teacher", teacher, TEACHER, batch))}
    for steps in STUDENT_STEPS:
        few = SamplerConfig(kind="consistency", num_steps=steps)
        contenders[f"student_{steps}"] = shard_maker(_config(folder, f"few-{steps}", student, few, batch))
    taken = take_turns(contenders, rounds)
    found: dict[str, object] = {"parameters": parameter_count(network)}
    for name, turns in taken.items():
        found[f"{name}_images_per_cpu_second"] = batch * len(turns) / sum(turn.cpu for turn in turns)
    for name in list(taken)[1:]:
        found |= compare(taken, slow="teacher", fast=name)
    return found


def _config(folder: Path, name: str, model: Path, sampler: SamplerConfig, batch: int) -> GenerateConfig:
    return GenerateConfig(
        model=str(model),
        output=f"file://{folder}/out-{name}",
        count=batch,
        shard_size=batch,
        batch_size=batch,
        sampler=sampler,
        guards=GuardConfig(enabled=False),
        track=None,
    )


if __name__ == "__main__":
    raise SystemExit(main())

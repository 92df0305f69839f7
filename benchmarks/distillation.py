"""What students are worth after equal compute: `python -m benchmarks.distillation --work FOLDER`.

For each seed a teacher by the preset `digits`, 2,000 of its images as pairs, and students by the preset `digits-fast`
(`--presets emoji-32 emoji-fast`: by those), each with as many evaluations of a network in training (a backward pass
counts as two):
- consistency: consistency distillation, as the preset;
- pairs: regression on the pairs alone, which needs neither the teacher nor a second evaluation of the student;
- both: half of the images are learned as pairs, of the teacher's images;
- tuning: consistency tuning, which needs no teacher.
Each is judged by 2,000 samples of another seed, for 1, 2 and 4 evaluations an image, with the metrics of
`ddpm evaluate`; so is the teacher. Classes are even, or drawn as `--classes data` says.

Trainings and samples are computed on this machine's GPU with --gpu, and otherwise in one thread. Whatever is finished
is kept in --work; the same command goes on where it was stopped. Once the first command has a classifier, others with
different --seeds may run beside it.
"""

import json
import os
import statistics
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.common import add_output_options, machine, plain_parser, publish
from benchmarks.generate import open_writer
from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.distill_job import DistillConfig
from ddpm_pipeline.config.evaluation import EvaluateConfig, FeaturesConfig
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.devices.measuring import measuring_gpu
from ddpm_pipeline.distill.plan_distillation import plan_distillation
from ddpm_pipeline.evaluate.measure import model_features
from ddpm_pipeline.evaluate.metrics import compute_metrics
from ddpm_pipeline.features.reference_set import load_reference
from ddpm_pipeline.features.train_classifier import train_features
from ddpm_pipeline.generate.done_records import RecordAggregate
from ddpm_pipeline.generate.finalize import ModelFacts, publish_manifest
from ddpm_pipeline.generate.model_source import find_model
from ddpm_pipeline.jobs.runner import JobArguments, settings_of
from ddpm_pipeline.parallel import HERE
from ddpm_pipeline.progress import no_progress
from ddpm_pipeline.train.checkpoint import latest_checkpoint
from ddpm_pipeline.train.export import export_model
from ddpm_pipeline.train.finetune import stage_initial
from ddpm_pipeline.train.training_plan import plan_training
from ddpm_pipeline.train.worker import TrainTask, train_local

S = TypeVar("S", bound=Settings)
SEEDS = (0, 1, 2)
COUNT = 2000
PAIRS_SEED, JUDGED_SEED = 1001, 2002
"""Of the noise that students learn from, and of the noise that they are judged by."""
RECIPES: dict[str, dict[str, object]] = {
    "consistency": {},
    "pairs": {"pair_share": 1.0},
    "both": {"pair_share": 0.5},
    "tuning": {"loss": {"follow": "noise"}},
}
COST = {"consistency": 6, "pairs": 3, "both": 6, "tuning": 4}
"""Evaluations of a network for an image in training: 3 are the student's forward and backward passes, 1 its target, 2
the guided step of its teacher."""
STUDENT = {
    "1": SamplerConfig(kind="consistency", num_steps=1, timesteps=(999,)),
    "2": SamplerConfig(kind="consistency", num_steps=2, timesteps=(999, 300)),
    "4": SamplerConfig(kind="consistency", num_steps=4),
}
"""Samplers of a student, by evaluations of the network."""
OWN = "own"
"""Stands for a teacher's number of evaluations: as many as its preset takes."""
METRICS = ("class_accuracy", "frechet_ratio", "near_copies", "precision", "recall")


@dataclass(frozen=True)
class Comparison:
    """Where and of what data students are compared."""

    work: Path
    presets: tuple[str, str]
    """Of the teacher and of the students."""
    classes: str
    """Of the samples, as a generation's setting."""
    gpus: int
    """1: on this machine's GPU."""

    def teacher(self, section: str, kind: type[S], **values: object) -> S:
        """A section of the teacher's preset, with other values by dotted name."""
        return _settings(self.presets[0], section, kind, values)

    def student(self, section: str, kind: type[S], **values: object) -> S:
        """A section of the students' preset, with other values by dotted name."""
        return _settings(self.presets[1], section, kind, values)

    @property
    def alone(self) -> dict[str, object]:
        """Settings of a training in this process."""
        return {"workers.num_workers": 1, "workers.gpus_per_worker": self.gpus}


def main() -> int:
    """Run what is missing, print what is there."""
    parser = plain_parser("distillation", __doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for finished trainings")
    parser.add_argument(
        "--presets", nargs=2, default=["digits", "digits-fast"], help="teacher's and students'"
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument(
        "--steps", type=int, default=1200, help="of consistency distillation; others by their cost"
    )
    parser.add_argument("--classes", choices=["auto", "data"], default="auto", help="of the samples")
    parser.add_argument("--gpu", action="store_true")
    add_output_options(parser)
    told = parser.parse_args()
    work: Path = told.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["DDPM_ROOT"] = work.as_uri()
    comparison = Comparison(work, tuple(told.presets), told.classes, int(told.gpu))
    if not any(work.glob("data/*/index.json")):
        pack(comparison.teacher("pack", PackConfig))
    train_features(comparison.teacher("features", FeaturesConfig), no_progress)
    for seed in told.seeds:
        teacher = make_teacher(comparison, seed)
        for recipe in told.recipes:
            judge(comparison, make_student(comparison, teacher, recipe, seed, told.steps), STUDENT)
        judge(comparison, teacher, {OWN: comparison.teacher("generate", GenerateConfig).sampler})
    publish(figures(work, told.steps) | machine(), told)
    return 0


def _settings(preset: str, section: str, kind: type[S], values: Mapping[str, object]) -> S:
    words = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items()]
    return settings_of(kind, section, JobArguments.of([preset, *words]))


def make_teacher(comparison: Comparison, seed: int) -> Path:
    """A model by the teacher's preset."""
    folder = comparison.work / f"teacher-{seed}"
    if not folder.exists():
        train(comparison.teacher("train", TrainConfig, seed=seed, gate=None, **comparison.alone), folder)
    return folder


def make_pairs(comparison: Comparison, teacher: Path) -> str:
    """A generation by a teacher; its URI."""
    output = f"file://{teacher}-pairs"
    own = {"model": str(teacher), "output": output, "seed": PAIRS_SEED, "features": None, "track": None}
    generate(comparison.teacher("generate", GenerateConfig, **_samples(comparison), **own))
    return output


def make_student(comparison: Comparison, teacher: Path, recipe: str, seed: int, steps: int) -> Path:
    """A student of `teacher` by a recipe, for the cost of `steps` of the first recipe."""
    folder = comparison.work / f"{recipe}-{steps}-{seed}"
    if not folder.exists():
        own = RECIPES[recipe] | {"steps": steps * COST["consistency"] // COST[recipe]}
        if "pair_share" in own:
            own |= {"data": None, "pairs": make_pairs(comparison, teacher)}
        names = {"name": recipe, "teacher": str(teacher), "seed": seed}
        config = comparison.student("distill", DistillConfig, **names, **own, **comparison.alone)
        train(plan_distillation(config, no_progress), folder)
    return folder


def _samples(comparison: Comparison) -> dict[str, object]:
    return {"count": COUNT, "classes": comparison.classes, "gpus_per_worker": comparison.gpus}


def train(config: TrainConfig, folder: Path) -> None:
    """Train in this process, from the last checkpoint, and put the model into `folder`, whole or not at all."""
    plan = plan_training(config)
    initial = None if plan.initial is None else plan.initial.sha256
    if plan.initial is not None:
        stage_initial(plan.store, plan.initial)
    task = TrainTask(config, plan.identity, plan.store.uri, plan.index.digest, initial_sha256=initial)
    train_local(task, no_progress, threading.Event())
    checkpoint = latest_checkpoint(plan.store)
    assert checkpoint is not None  # the training has written it
    part = folder.with_suffix(".part")
    export_model(plan, checkpoint, None, part)
    part.rename(folder)
    print(f"{folder.name}: trained", flush=True)


def generate(config: GenerateConfig) -> None:
    """A whole generation in this process; finished shards are kept."""
    writer, records = open_writer(config), RecordAggregate()
    for unit in writer.generation.shards():
        records.add(unit.number, writer.write(unit).record)
    publish_manifest(writer.generation, records, ModelFacts(writer.engine.card.class_names))


def judge(comparison: Comparison, model: Path, samplers: Mapping[str, SamplerConfig]) -> None:
    """Measure samples by each of the samplers; what has been measured stays."""
    config = comparison.teacher("evaluate", EvaluateConfig)
    workers = HERE._replace(gpu=measuring_gpu() if comparison.gpus else None)
    reference = load_reference(load_index(config.reference), config.network, config.batch_size, workers)
    for name, sampler in samplers.items():
        file = model.parent / f"{model.name}.{name}.json"
        if not file.exists():
            own = {"model": str(model), "sampler": sampler.model_dump(), "seed": JUDGED_SEED}
            wanted = comparison.teacher("generate", GenerateConfig, **_samples(comparison), **own)
            samples = model_features(find_model(str(model)), wanted, config, workers.gpu)
            metrics = compute_metrics(samples, reference, config)
            part = file.with_suffix(".part")
            part.write_text(json.dumps({metric: metrics[metric].value for metric in METRICS}))
            part.rename(file)
            print(file.stem, file.read_text(), flush=True)


def figures(work: Path, steps: int) -> dict[str, object]:
    """Mean of each metric over the seeds that are there, with the values themselves."""
    found: dict[str, object] = {"samples": COUNT}
    models = {"teacher": "teacher-{seed}"} | {recipe: f"{recipe}-{steps}-{{seed}}" for recipe in RECIPES}
    for name, pattern in models.items():
        for evaluations in (OWN,) if name == "teacher" else STUDENT:
            files = [work / f"{pattern.format(seed=seed)}.{evaluations}.json" for seed in SEEDS]
            runs = [json.loads(file.read_text()) for file in files if file.exists()]
            for metric in METRICS if runs else ():
                values = [run[metric] for run in runs]
                found[f"{name}_{evaluations}_{metric}"] = statistics.mean(values)
                found[f"{name}_{evaluations}_{metric}_by_seed"] = [round(value, 4) for value in values]
    return found


if __name__ == "__main__":
    raise SystemExit(main())

"""How good samples are after equal compute: `python -m benchmarks.quality --work FOLDER [--peers FOLDER]`.

Scikit-learn's digits, a third of them held out; the digits preset's network without classes; the same number of steps
of the same batch. Each contender keeps its own recipe (objective, schedule, optimiser, average, sampler):
- ours: the digits preset;
- diffusers: `train_unconditional` with --use_ema (its 500 steps of warm-up cut to a tenth of so short a training);
- denoising_diffusion: the Trainer of denoising-diffusion-pytorch;
- the last two again with our learning rate (`…_our_lr`), for theirs is meant for longer trainings;
- the digits preset with one setting of its training changed (`ours_…`, see `VARIANTS`).
Judged is the Fréchet distance of as many samples as there are held-out images from these, over a classifier trained
on the others; `floor` is that of the training images themselves.

Every finished training is kept in --work; the same command goes on where it was stopped, --minutes ends it early.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import add_output_options, machine, plain_parser, publish
from benchmarks.trainers import (
    Contender,
    DenoisingDiffusion,
    Diffusers,
    Ours,
    Setting,
    pack_images,
    use_peers,
)
from ddpm_pipeline.config.evaluation import FeaturesConfig
from ddpm_pipeline.config.settings_files import read_yaml
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.diffusion.image_scaling import from_uint8
from ddpm_pipeline.features.classifier import Classifier, accuracy, split_rows, train_classifier
from ddpm_pipeline.features.distances import GaussianMoments, frechet_distance, moments_of
from ddpm_pipeline.jobs.runner import preset_file

PEERS = ("diffusers", "denoising_diffusion", "diffusers_our_lr", "denoising_diffusion_our_lr")
_MIN_SNR = {"target": "v", "weighting": "min-snr"}
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours_eps": {"objective": {"target": "eps"}},
    "ours_eps_min_snr": {"objective": {"target": "eps", "weighting": "min-snr"}},
    "ours_x0": {"objective": {"target": "x0"}},
    "ours_v_min_snr": {"objective": _MIN_SNR},
    "ours_v_min_snr_stratified": {"objective": _MIN_SNR, "timesteps": {"stratified": True}},
    "ours_v_min_snr_importance": {"objective": _MIN_SNR, "timesteps": {"importance": True}},
    "ours_v_min_snr_both": {"objective": _MIN_SNR, "timesteps": {"importance": True, "stratified": True}},
    "ours_stratified": {"timesteps": {"stratified": True}},
    "ours_power_average": {"ema": {"kind": "power"}},
    "ours_twice_the_rate": {"optimizer": {"lr": 2e-3, "warmup_steps": 100, "decay": "cosine"}},
    "ours_half_the_rate": {"optimizer": {"lr": 5e-4, "warmup_steps": 100, "decay": "cosine"}},
    "ours_without_warmup": {"optimizer": {"lr": 1e-3, "decay": "cosine"}},
    "ours_constant_rate": {"optimizer": {"lr": 1e-3, "warmup_steps": 100}},
}
"""Sections of `train` that replace those of the digits preset."""
RECIPES = (*VARIANTS, *PEERS)
SEEDS = (0, 1, 2)
HELD_OUT = 1 / 3


@dataclass(frozen=True)
class Digits:
    """The two parts of the data, and the judge."""

    train: Tensor
    held: Tensor
    judge: Classifier
    judge_accuracy: float


def main() -> int:
    """Run what is missing, print what is there."""
    parser = plain_parser("quality", __doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for finished trainings")
    parser.add_argument("--peers", type=Path, help="folder made by: python -m benchmarks.trainers FOLDER")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["ours", *PEERS])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="trainings of each recipe")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no training after these")
    add_output_options(parser)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    if not use_peers(told.peers):
        told.recipes = [recipe for recipe in told.recipes if recipe in VARIANTS]
    told.work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * told.minutes
    digits = load_parts()
    for seed in SEEDS[: told.seeds]:
        for recipe in told.recipes:
            if kept(told, recipe, seed) is None and time.monotonic() < deadline:
                keep(told, recipe, seed, one_run(told, digits, recipe, seed))
    publish(figures(told, digits), told)
    return 0


def load_parts() -> Digits:
    """The digits, split, and a classifier of the training part."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(((found.images * 255 + 8) // 16).astype("uint8"))[:, None]
    labels = torch.from_numpy(found.target).long()
    train, held = split_rows(len(images), HELD_OUT, seed=0)
    config = FeaturesConfig(data="digits")
    judge = train_classifier(config, images[train], labels[train], 10, lambda done, total: None)
    return Digits(images[train], images[held], judge, accuracy(judge, images[held], labels[held]))


def one_run(told: argparse.Namespace, digits: Digits, recipe: str, seed: int) -> dict[str, float]:
    """Train and sample; the distance, and the CPU seconds of both."""
    contender = begin(told, digits, recipe, seed)
    began = time.process_time()
    contender.steps(told.steps)
    trained = time.process_time()
    samples = contender.sample(len(digits.held))
    distance = frechet_distance(moments(digits, samples), moments(digits, digits.held))
    return {
        "distance": distance,
        "train_cpu_seconds": trained - began,
        "sample_cpu_seconds": time.process_time() - trained,
    }


def begin(told: argparse.Namespace, digits: Digits, recipe: str, seed: int) -> Contender:
    """A training at its first step."""
    uri = pack_images(told.work.resolve() / "data", digits.train)
    preset = read_yaml(preset_file("digits"))
    section = preset["train"] | VARIANTS.get(recipe, {})
    config = ours_of(section, uri, told.steps, told.batch, seed)
    if recipe in VARIANTS:
        sampler = preset["generate"]["sampler"] | {"guidance_scale": 1.0}  # guidance needs classes
        return Ours(config, type(config.grid.sampler).model_validate(sampler))
    setting = Setting(config.net, digits.train, told.batch, told.steps, seed)
    kind = Diffusers if recipe.startswith("diffusers") else DenoisingDiffusion
    return kind(setting, lr=config.optimizer.lr) if recipe.endswith("our_lr") else kind(setting)


def ours_of(section: dict[str, object], uri: str, steps: int, batch: int, seed: int) -> TrainConfig:
    """The digits preset without classes, for so many steps."""
    tree = {name: value for name, value in section.items() if name not in ("gate", "workers", "label_drop")}
    net = tree["net"]
    assert isinstance(net, dict)
    return TrainConfig.model_validate(
        tree
        | {
            "data": {"uri": uri, "flip": False},
            "net": {k: v for k, v in net.items() if k not in ("num_classes", "null_class")},
            "steps": steps,
            "global_batch": batch,
            "seed": seed,
            "checkpoint": {"every_steps": 10**6},
        }
    )


def moments(digits: Digits, images: Tensor) -> GaussianMoments:
    """Of the judge's features of images uint8 (N, 1, 8, 8)."""
    with torch.inference_mode():
        return moments_of(digits.judge(from_uint8(images))[0].numpy())


def figures(told: argparse.Namespace, digits: Digits) -> dict[str, object]:
    """Means over the seeds that are there, and of each other recipe its mean over ours."""
    found: dict[str, object] = {
        "steps": told.steps,
        "batch": told.batch,
        "samples": len(digits.held),
        "judge_accuracy": digits.judge_accuracy,
        "floor": frechet_distance(moments(digits, digits.train), moments(digits, digits.held)),
        **machine("diffusers"),
    }
    means: dict[str, float] = {}
    for recipe in RECIPES:
        runs = [run for seed in SEEDS[: told.seeds] if (run := kept(told, recipe, seed)) is not None]
        if runs:
            distances = [run["distance"] for run in runs]
            means[recipe] = statistics.mean(distances)
            found[f"{recipe}_distance"] = means[recipe]
            found[f"{recipe}_distances"] = [round(each, 3) for each in distances]
            found[f"{recipe}_train_cpu_seconds"] = statistics.mean(run["train_cpu_seconds"] for run in runs)
    found |= {
        f"{recipe}_over_ours": mean / means["ours"]
        for recipe, mean in means.items()
        if "ours" in means and recipe != "ours"
    }
    return found


def kept(told: argparse.Namespace, recipe: str, seed: int) -> dict[str, float] | None:
    """What a finished training with these settings left."""
    file = place(told, recipe, seed)
    return json.loads(file.read_text()) if file.exists() else None


def keep(told: argparse.Namespace, recipe: str, seed: int, run: dict[str, float]) -> None:
    """Whole or not at all."""
    file = place(told, recipe, seed)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(run) + "\n")
    part.rename(file)


def place(told: argparse.Namespace, recipe: str, seed: int) -> Path:
    """The file of a training."""
    return told.work / f"{recipe}-{told.steps}x{told.batch}-seed{seed}.json"


if __name__ == "__main__":
    raise SystemExit(main())

"""Search for a model's sampler: quality and cost of every candidate as a table, a plot and a recommended preset."""

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import yaml

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.diffusion import SamplerConfig, check_together
from ddpm_pipeline.config.evaluation import TuneConfig
from ddpm_pipeline.config.generation import SpecSettings
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.diffusion.evaluations import network_calls
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.document import Metric
from ddpm_pipeline.evaluate.measure import model_features
from ddpm_pipeline.evaluate.metrics import compute_metrics
from ddpm_pipeline.features.feature_set import FeatureSet
from ddpm_pipeline.features.reference_set import load_reference
from ddpm_pipeline.generate.model_source import ResolvedModel, find_model
from ddpm_pipeline.parallel import OpenWorkers, in_process
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.store import open_store


class Candidate(Settings):
    """One sampler with its cost and its quality."""

    sampler: SamplerConfig
    """The reverse process."""
    evaluations: int
    """Evaluations of the network for an image."""
    seconds: float
    """Time of all images on one core or one GPU, evaluation included."""
    metrics: dict[str, Metric]
    """By name."""


@dataclass(frozen=True)
class SamplerSearch:
    """All candidates, in the order of their cost, and the recommended one."""

    model: ResolvedModel
    metric: str
    candidates: list[Candidate]
    best: Candidate


def search_samplers(
    config: TuneConfig,
    progress: Progress,
    open_workers: OpenWorkers = in_process,
    used_gpus: bool = False,
) -> SamplerSearch:
    """Try every candidate, all on one kind of device. `used_gpus`: whether the model's jobs use GPUs.

    UserError for a sampler that the model cannot do, and for a metric that is not available."""
    model = find_model(config.model)
    samplers = candidate_samplers(config, model)
    index = load_index(config.evaluate.reference)
    candidates: list[Candidate] = []
    with open_workers(used_gpus) as workers:
        reference = load_reference(index, config.evaluate.network, config.evaluate.batch_size, workers)
        attempt = partial(try_sampler, config, model, reference, workers.gpu)
        for candidate in workers.map(attempt, samplers):
            if config.metric not in candidate.metrics:
                raise UserError(
                    f"tune.metric: these samples and this reference have no {config.metric}; "
                    f"available are {', '.join(candidate.metrics)}, or raise count"
                )
            candidates.append(candidate)
            progress(len(candidates), len(samplers), _name(candidate.sampler))
    return SamplerSearch(model, config.metric, candidates, recommended(candidates, config))


def save_search(search: SamplerSearch, output: str) -> str:
    """Write table, plot and preset to the model's folder below `output`; returns the folder's URI."""
    model = search.model
    folder = f"{output.rstrip('/')}/{model.name}" + (f"-{model.version}" if model.version else "")
    store = open_store(folder)
    document = [candidate.model_dump(mode="json") for candidate in search.candidates]
    store.write("samplers.json", (json.dumps(document, indent=2) + "\n").encode())
    store.write("samplers.png", plot(search))
    store.write("preset.yaml", preset(search.best).encode())
    return folder


def candidate_samplers(config: TuneConfig, model: ResolvedModel) -> list[SamplerConfig]:
    """Every sampler to try, cheapest first. UserError for one that the model cannot do."""
    card = model.card
    if set(config.guidance) != {1.0} and card.net.null_label is None:
        raise UserError("tune.guidance: the network was trained without net.null_class; use [1.0]")
    samplers = [
        SamplerConfig(kind=kind, num_steps=steps, guidance_scale=scale)
        for kind in config.kinds
        for steps in config.steps
        for scale in config.guidance
    ]
    for sampler in samplers:
        check_together(card.schedule, card.objective, sampler, distilled=card.distillation is not None)
    return sorted(samplers, key=lambda s: (evaluations(s), s.kind))


def evaluations(sampler: SamplerConfig) -> int:
    """Evaluations of the network for an image; guidance doubles them."""
    once = network_calls(sampler)
    return once * (1 if sampler.guidance_scale == 1.0 else 2)


def recommended(candidates: Sequence[Candidate], config: TuneConfig) -> Candidate:
    """The cheapest candidate that is nearly as good as the best."""
    best = min(c.metrics[config.metric].value for c in candidates)
    limit = best + config.tolerance * abs(best)  # an unbiased kernel distance may be below 0
    return min(
        (c for c in candidates if c.metrics[config.metric].value <= limit),
        key=lambda c: (c.evaluations, c.seconds),
    )


def front(candidates: Sequence[Candidate], metric: str) -> list[Candidate]:
    """The Pareto front: the candidates that no cheaper one beats, cheapest first."""
    out: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.evaluations, c.metrics[metric].value)):
        if not out or candidate.metrics[metric].value < out[-1].metrics[metric].value:
            out.append(candidate)
    return out


def table(search: SamplerSearch) -> list[str]:
    """A line for each candidate: * on the front, > recommended."""
    on_front = front(search.candidates, search.metric)
    columns = dict.fromkeys((search.metric, "frechet_ratio", "class_accuracy", "precision", "recall"))
    columns = [column for column in columns if column in search.candidates[0].metrics]
    lines = [f"   {'sampler':<26}{'evals':>7}{'seconds':>9}" + "".join(f"{c:>16}" for c in columns)]
    for candidate in search.candidates:
        mark = (">" if candidate is search.best else " ") + ("*" if candidate in on_front else " ")
        values = "".join(f"{candidate.metrics[c].value:>16.4f}" for c in columns)
        cost = f"{candidate.evaluations:>7}{candidate.seconds:>9.1f}"
        lines.append(f"{mark} {_name(candidate.sampler):<26}{cost}{values}")
    return lines


def plot(search: SamplerSearch) -> bytes:
    """Quality against cost, with the front, as PNG."""
    from matplotlib.figure import Figure

    def points(candidates: Sequence[Candidate]) -> tuple[list[int], list[float]]:
        return [c.evaluations for c in candidates], [c.metrics[search.metric].value for c in candidates]

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind in sorted({c.sampler.kind for c in search.candidates}):
        axes.scatter(*points([c for c in search.candidates if c.sampler.kind == kind]), label=kind)
    axes.plot(*points(front(search.candidates, search.metric)), "k--", lw=1, label="front")
    best = (search.best.evaluations, search.best.metrics[search.metric].value)
    axes.annotate("recommended", best, (10, 15), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per image", ylabel=search.metric)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def preset(best: Candidate) -> str:
    """The recommendation as settings of a generation."""
    sampler = best.sampler.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump({"generate": {"sampler": sampler}}, sort_keys=False)


def try_sampler(
    config: TuneConfig,
    model: ResolvedModel,
    reference: FeatureSet,
    gpu: str | None,
    sampler: SamplerConfig,
) -> Candidate:
    """Draw samples and compute their metrics. Deterministic, except for the seconds. `gpu`: name of this task's GPU."""
    began = time.perf_counter()
    settings = SpecSettings(
        model=config.model,
        count=config.count,
        seed=config.seed,
        sampler=sampler,
        shard_size=config.count,
        batch_size=min(config.batch_size, config.count),
    )
    samples = model_features(model, settings, config.evaluate, gpu)
    return Candidate(
        sampler=sampler,
        evaluations=evaluations(sampler),
        seconds=time.perf_counter() - began,
        metrics=compute_metrics(samples, reference, config.evaluate),
    )


def _name(sampler: SamplerConfig) -> str:
    guidance = f" w={sampler.guidance_scale:g}" if sampler.guidance_scale != 1.0 else ""
    return f"{sampler.kind} {sampler.num_steps}{guidance}"

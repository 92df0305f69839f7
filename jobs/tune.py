"""Search for a model's sampler: `ddpm tune-sampler digits model=digits@champion`.

Quality against cost for every candidate, as a table (JSON, and printed), a plot, and a recommended preset.
"""

import io
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial

import yaml

from jobs.evaluate import measure_model
from jobs.runner import DONE, JobArguments, run_job
from pipeline.config.base import Settings
from pipeline.config.diffusion import SamplerConfig, check_together
from pipeline.config.evaluation import TuneConfig
from pipeline.config.generation import SpecSettings
from pipeline.data.index import load_index
from pipeline.errors import UserError
from pipeline.evaluate.metrics import Metric, compute_metrics
from pipeline.features.feature_set import FeatureSet
from pipeline.features.reference_set import load_reference
from pipeline.generate.model_source import ResolvedModel, find_model
from pipeline.progress import Progress
from pipeline.store import open_store
from pipeline.telemetry.terminal import echo


class Candidate(Settings):
    """One sampler with what it costs and yields."""

    sampler: SamplerConfig
    """The reverse process."""
    evaluations: int
    """Times the network is evaluated for an image."""
    seconds: float
    """Time of all images on one core, measuring included."""
    metrics: dict[str, Metric]
    """Figures by name."""


def run_call(call: JobArguments) -> int:
    """Run the job that a call describes."""
    return run_job("tune", TuneConfig, run, call, unit="samplers")


def run(config: TuneConfig, progress: Progress) -> int:
    """Try every candidate, print the table, keep table, plot and preset."""
    model = find_model(config.model)
    asked = samplers(config, model)
    index = load_index(config.evaluate.reference)
    real = load_reference(index, config.evaluate.network, config.evaluate.batch_size)
    tried: list[Candidate] = []
    for candidate in _try_all(config, model, asked, real):
        if config.metric not in candidate.metrics:
            raise UserError(
                f"tune.metric: these samples and this reference have no {config.metric}; "
                f"known are {', '.join(candidate.metrics)}, or raise count"
            )
        tried.append(candidate)
        progress(len(tried), len(asked), _name(candidate.sampler))
    best = recommended(tried, config)
    echo(*table(tried, best, config.metric))
    folder = f"{config.output.rstrip('/')}/{model.name}" + (f"-{model.version}" if model.version else "")
    store = open_store(folder)
    document = [c.model_dump(mode="json") for c in tried]
    store.write("samplers.json", (json.dumps(document, indent=2) + "\n").encode())
    store.write("samplers.png", plot(tried, best, config.metric))
    store.write("preset.yaml", preset(best).encode())
    echo(f"kept     {folder}/samplers.json, samplers.png, preset.yaml")
    echo("next     ddpm generate … --config preset.yaml:", *preset(best).splitlines())
    return DONE


def samplers(config: TuneConfig, model: ResolvedModel) -> list[SamplerConfig]:
    """Every candidate, cheapest first. UserError for one that the model cannot do."""
    card = model.card
    if set(config.guidance) != {1.0} and card.net.null_label is None:
        raise UserError("tune.guidance: the network was trained without net.null_class; use [1.0]")
    found = [
        SamplerConfig(kind=kind, num_steps=steps, guidance_scale=scale)
        for kind in config.kinds
        for steps in config.steps
        for scale in config.guidance
    ]
    for sampler in found:
        check_together(card.schedule, card.objective, sampler)
    return sorted(found, key=lambda s: (evaluations(s), s.kind))


def evaluations(sampler: SamplerConfig) -> int:
    """Times the network is evaluated for an image; guidance doubles them."""
    once = 2 * sampler.num_steps - 1 if sampler.kind == "heun" else sampler.num_steps
    return once * (1 if sampler.guidance_scale == 1.0 else 2)


def recommended(tried: Sequence[Candidate], config: TuneConfig) -> Candidate:
    """The cheapest candidate that is nearly as good as the best."""
    best = min(c.metrics[config.metric].value for c in tried)
    limit = best + config.tolerance * abs(best)  # an unbiased kernel distance may be below 0
    return min(
        (c for c in tried if c.metrics[config.metric].value <= limit),
        key=lambda c: (c.evaluations, c.seconds),
    )


def front(tried: Sequence[Candidate], metric: str) -> list[Candidate]:
    """The candidates that nothing cheaper beats, cheapest first."""
    out: list[Candidate] = []
    for candidate in sorted(tried, key=lambda c: (c.evaluations, c.metrics[metric].value)):
        if not out or candidate.metrics[metric].value < out[-1].metrics[metric].value:
            out.append(candidate)
    return out


def table(tried: Sequence[Candidate], best: Candidate, metric: str) -> list[str]:
    """A line for each candidate: * on the front, > recommended."""
    ahead = front(tried, metric)
    columns = [metric] + [
        c for c in ("frechet_ratio", "class_accuracy", "precision", "recall") if c != metric
    ]
    columns = [c for c in columns if c in tried[0].metrics]
    lines = [f"   {'sampler':<26}{'evals':>7}{'seconds':>9}" + "".join(f"{c:>16}" for c in columns)]
    for candidate in tried:
        mark = (">" if candidate is best else " ") + ("*" if candidate in ahead else " ")
        values = "".join(f"{candidate.metrics[c].value:>16.4f}" for c in columns)
        cost = f"{candidate.evaluations:>7}{candidate.seconds:>9.1f}"
        lines.append(f"{mark} {_name(candidate.sampler):<26}{cost}{values}")
    return lines


def plot(tried: Sequence[Candidate], best: Candidate, metric: str) -> bytes:
    """The quality/cost front as PNG."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(7, 4.5), layout="constrained")
    axes = drawing.subplots()
    for kind in sorted({c.sampler.kind for c in tried}):
        own = [c for c in tried if c.sampler.kind == kind]
        axes.scatter([c.evaluations for c in own], [c.metrics[metric].value for c in own], label=kind)
    ahead = front(tried, metric)
    axes.plot(
        [c.evaluations for c in ahead], [c.metrics[metric].value for c in ahead], "k--", lw=1, label="front"
    )
    axes.annotate(
        "recommended", (best.evaluations, best.metrics[metric].value), (10, 15), textcoords="offset points"
    )
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per image", ylabel=metric)
    axes.legend()
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def preset(best: Candidate) -> str:
    """The recommendation as settings of a generation."""
    sampler = best.sampler.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump({"generate": {"sampler": sampler}}, sort_keys=False)


def try_sampler(
    config: TuneConfig, model: ResolvedModel, sampler: SamplerConfig, real: FeatureSet
) -> Candidate:
    """Sample, measure, compare: a function of its arguments but for the seconds."""
    began = time.perf_counter()
    asked = SpecSettings(
        model=config.model,
        count=config.count,
        seed=config.seed,
        sampler=sampler,
        shard_size=config.count,
        batch_size=min(config.batch_size, config.count),
    )
    samples = measure_model(model, asked, config.evaluate)
    return Candidate(
        sampler=sampler,
        evaluations=evaluations(sampler),
        seconds=time.perf_counter() - began,
        metrics=compute_metrics(samples, real, config.evaluate),
    )


def _try_all(
    config: TuneConfig, model: ResolvedModel, asked: Sequence[SamplerConfig], real: FeatureSet
) -> Iterator[Candidate]:
    if config.num_workers == 0:
        for sampler in asked:
            yield try_sampler(config, model, sampler, real)
        return
    from jobs.ray_map import RayMap
    from jobs.ray_session import ray_cluster, require_resources

    with ray_cluster():
        require_resources(config.num_workers, 1, 0, "tune")
        yield from RayMap(config.num_workers)(partial(try_sampler, config, model, real=real), asked)


def _name(sampler: SamplerConfig) -> str:
    guidance = f" w={sampler.guidance_scale:g}" if sampler.guidance_scale != 1.0 else ""
    return f"{sampler.kind} {sampler.num_steps}{guidance}"

"""The MLflow run of a generation: the same one, however often the generation is interrupted or extended."""

import time

import yaml

from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.efficiency import Efficiency
from ddpm_pipeline.generate.generation_cost import Cost
from ddpm_pipeline.generate.layout import CONTACT_KEY, REPORT_KEY
from ddpm_pipeline.generate.manifest import Manifest
from ddpm_pipeline.generate.spec import Spec, pretty
from ddpm_pipeline.tracking import (
    Run,
    Spool,
    describe,
    finish,
    image_markdown,
    link_model,
    open_run,
    require_server,
    resolve,
    source_tags,
    spool_of,
)

_POINT_SECONDS = 5.0


class GenerationRun:
    """Logs a generation to MLflow; does nothing if tracking is off. Never blocks the work."""

    def __init__(self, config: GenerateConfig, spec: Spec) -> None:
        self._config = config
        self._spec = spec
        self._run: Run | None = None
        self._spool: Spool | None = None
        self._next_point = 0.0
        track = config.track
        if track is None:
            return
        self._run = open_run(
            track.experiment,
            config.name or _name(config, spec),
            key=f"generate/{spec.digest[:16]}/{config.output}"[:500],
            params=_params(spec),
            tags={**source_tags(), "ddpm.output": config.output, "ddpm.spec": spec.digest},
            config_yaml=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
            description=_description(config, spec),
            color=track.color,
            reopen_finished=True,  # a larger count or a repair continues the same run
        )
        if spec.model.reference is not None:
            link_model(self._run.run_id, resolve(spec.model.reference))
        self._spool = Spool(
            spool_of(self._run.run_id),
            None,
            self._run.run_id,
            send_interval_seconds=track.send_interval_seconds,
            heartbeat_seconds=track.heartbeat_seconds,
            name=self._run.name,
            mirrors=track.mirrors,
        )

    @property
    def url(self) -> str | None:
        """The run's web page; None without tracking."""
        return None if self._run is None else self._run.url

    def progress(
        self,
        images_done: int,
        images_per_second: float,
        failed: int,
        in_progress: int,
        made_twice: int = 0,
        efficiency: Efficiency | None = None,
        cost: Cost | None = None,
    ) -> None:
        """Log progress, every few seconds at most; the step is the number of images done."""
        if self._spool is None or time.monotonic() < self._next_point:
            return
        self._next_point = time.monotonic() + _POINT_SECONDS
        points = {
            "progress/images": float(images_done),
            "progress/share": images_done / self._spec.count,
            "progress/failed_shards": float(failed),
            "progress/shards_made_twice": float(made_twice),
            "perf/images_per_s": images_per_second,
            "perf/shards_under_way": float(in_progress),
        }
        for measured in (efficiency, cost):
            points |= {} if measured is None else measured.metrics()
        self._spool.metrics(images_done, points)

    def complete(
        self,
        manifest: Manifest,
        sheet: bytes,
        report: bytes,
        efficiency: Efficiency | None = None,
        cost: Cost | None = None,
    ) -> None:
        """Log the contact sheet, the report and the statistics of a complete generation."""
        if self._spool is None or self._run is None:
            return
        statistics = manifest.statistics
        points = {"progress/images": float(manifest.count), "progress/share": 1.0}
        points |= {f"images/channel_{c}_mean": value for c, value in enumerate(statistics.channel_mean)}
        points |= {f"images/channel_{c}_std": value for c, value in enumerate(statistics.channel_std)}
        points |= {
            "images/constant": float(statistics.constant),
            "images/saturated": float(statistics.saturated),
        }
        points |= {"perf/device_seconds": manifest.times.device_seconds}
        for measured in (efficiency, cost):
            points |= {} if measured is None else measured.metrics()
        self._spool.metrics(manifest.count, points)
        self._spool.image("contact-sheet", manifest.count, sheet)
        self._spool.artifact(CONTACT_KEY, sheet)
        self._spool.artifact(REPORT_KEY, report)
        self._spool.artifact("summary.json", pretty(manifest.model_dump(mode="json")))
        image = image_markdown(self._run.run_id, CONTACT_KEY, "contact sheet")
        made = "" if efficiency is None else f" Made by {efficiency}."
        made += "" if cost is None else f" Cost: {cost.text()}."
        describe(self._run.run_id, f"{_description(self._config, self._spec)}{made}\n\n{image}")

    def leave(self) -> None:
        """Deliver pending metrics and leave the run open for another job of the same generation."""
        if self._spool is not None and self._config.track is not None:
            self._spool.close(self._config.track.close_timeout_seconds)

    def end(self, finished: bool, killed: bool = False, reason: str | None = None) -> None:
        """Deliver pending metrics and close the run."""
        self.leave()
        if self._run is not None:
            finish(self._run.run_id, "FINISHED" if finished else "KILLED" if killed else "FAILED", reason)


def require_tracking(config: GenerateConfig) -> None:
    """UserError if tracking is on and the tracking server does not answer."""
    if config.track is None:
        return
    try:
        require_server()
    except UserError as error:
        raise type(error)(f"{error}; or set track=null to run without tracking") from None


def _name(config: GenerateConfig, spec: Spec) -> str:
    version = "" if spec.model.version is None else f"-v{spec.model.version}"
    return f"{spec.model.name}{version} to {config.output.rstrip('/').rsplit('/', 1)[-1]}"


def _params(spec: Spec) -> dict[str, object]:
    return {
        "model": spec.model.reference or spec.model.name,
        "sampler": spec.sampler.kind,
        "steps": spec.sampler.num_steps,
        "guidance": spec.sampler.guidance_scale,
        "seed": spec.seed,
        "batch_size": spec.batch_size,
        "shard_size": spec.shard_size,
        "dtype": spec.dtype,
    }


def _description(config: GenerateConfig, spec: Spec) -> str:
    return f"{spec.count:,} samples from index {spec.first_index}, into `{config.output}`."

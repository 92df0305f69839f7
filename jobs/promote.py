"""The registry's gate: `ddpm promote digits` and `ddpm rollback digits`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ddpm_pipeline.config.evaluation import PromoteConfig
from ddpm_pipeline.jobs.ray_map import measuring_workers
from ddpm_pipeline.jobs.runner import DONE, FAILED, JobArguments, preset_uses_gpus, run_job, use_running_stack
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.telemetry.terminal import echo, echo_json

if TYPE_CHECKING:
    from ddpm_pipeline.evaluate.gate import Decision


def run_call(call: JobArguments) -> int:
    """Run the job that a call describes."""

    def work(config: PromoteConfig, progress: Progress) -> int:
        return run(config, progress, call.as_json, preset_uses_gpus(call))

    return run_job("promote", PromoteConfig, work, call, unit="models")


def run(config: PromoteConfig, progress: Progress, as_json: bool = False, used_gpus: bool = False) -> int:
    """Compare, decide, print the decision."""
    from ddpm_pipeline.evaluate.gate import table

    decision = decide(config, progress, used_gpus)
    if decision is None:
        echo(f"nothing to do: {config.model}@{config.challenger} is {config.model}@{config.champion} already")
        return DONE
    if as_json:
        echo_json(decision.model_dump(mode="json"))
    else:
        echo(*table(decision))
        echo(f"{decision.verdict}: {decision.challenger}: {decision.reason}")
        if decision.verdict == "refused" and decision.champion == decision.challenger:
            echo(
                f"next     it is {config.model}@{config.champion} already, as the first version of its name; "
                "register a better one, or remove the alias in the registry"
            )
    return DONE if decision.verdict == "promoted" else FAILED


def decide(config: PromoteConfig, progress: Progress, used_gpus: bool = False) -> Decision | None:
    """Compare challenger and champion, and promote the better one; None where they are one version."""
    from ddpm_pipeline.evaluate.promotion import promote

    workers = partial(measuring_workers, config.gate.evaluate, "promote.gate.evaluate")
    return promote(config, progress, workers, used_gpus)


def rollback(name: str, to: int | None = None) -> int:
    """Make the champion's predecessor, or version `to`, the champion again."""
    from ddpm_pipeline.evaluate.promotion import roll_back

    use_running_stack()
    echo(roll_back(name, to=to))
    return DONE

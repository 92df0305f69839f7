"""The registry's gate: `ddpm promote digits` and `ddpm rollback digits`."""

from jobs.runner import DONE, FAILED, JobArguments, run_job, use_running_stack
from pipeline.config.evaluation import PromoteConfig
from pipeline.progress import Progress
from pipeline.telemetry.terminal import echo, echo_json


def run_call(call: JobArguments) -> int:
    """Run the job that a call describes."""
    return run_job("promote", PromoteConfig, lambda c, p: run(c, p, call.as_json), call, unit="models")


def run(config: PromoteConfig, progress: Progress, as_json: bool = False) -> int:
    """Compare, decide, print the decision."""
    from pipeline.evaluate.gate import table
    from pipeline.evaluate.promotion import promote

    decision = promote(config, progress)
    if decision is None:
        echo(f"nothing to do: {config.model}@{config.challenger} is {config.model}@{config.champion} already")
        return DONE
    if as_json:
        echo_json(decision.model_dump(mode="json"))
    else:
        echo(*table(decision))
        echo(f"{decision.verdict}: {decision.challenger}: {decision.reason}")
    return DONE if decision.verdict == "promoted" else FAILED


def rollback(name: str, to: int | None = None) -> int:
    """Make the champion's predecessor, or version `to`, the champion again."""
    from pipeline.evaluate.promotion import roll_back

    use_running_stack()
    echo(roll_back(name, to=to))
    return DONE

"""From nothing to a verified bucket: what `make run` does once everything is installed.

Every part is an ordinary job with ordinary settings, so each does nothing where its work is done already.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.infra.local import LocalStack, sign_in
from ddpm_pipeline.infra.local.stack_state import StoreKind, read_state
from ddpm_pipeline.jobs.progress_bar import clock
from ddpm_pipeline.jobs.runner import DONE, LOCAL, JobArguments, settings_of, use_running_stack
from ddpm_pipeline.telemetry.terminal import echo

PRESET = "demo"
NUM_PARTS = 7


def demo(store: StoreKind | None = None) -> int:
    """Stack, data, training, samples, proof, figures; then where to look. Returns the first exit code that is not 0."""
    began = time.monotonic()
    call = JobArguments(preset=PRESET)
    _headline(1, "start the local stack")
    LocalStack(LOCAL, store=store).up(report=_print_line)
    use_running_stack()
    parts: list[tuple[str, Callable[[], int]]] = [
        ("pack the data set", lambda: _pack(call)),
        ("train the classifier that will judge the samples", lambda: _features(call)),
        ("train on the Ray cluster", lambda: _submit("train", TrainConfig, call)),
        ("generate on the Ray cluster", lambda: _submit("generate", GenerateConfig, call)),
        ("verify every object", lambda: _verify(call)),
        ("judge the samples", lambda: _evaluate(call)),
    ]
    for number, (title, part) in enumerate(parts, start=2):
        _headline(number, title)
        code = part()
        if code != DONE:
            return code
    _print_where_to_look(call, time.monotonic() - began)
    return DONE


def _pack(call: JobArguments) -> int:
    from ddpm_pipeline.jobs.pack import run_call

    return run_call(call)


def _submit(job: str, model: type[TrainConfig] | type[GenerateConfig], call: JobArguments) -> int:
    from ddpm_pipeline.jobs.submit import submit

    state = read_state(LOCAL)
    # `up` starts Ray anew where another Python started it, unless it is the user's own
    is_ours = state is not None and "ray" not in state.external
    return submit(job, settings_of(model, job, call), has_our_software=is_ours)


def _verify(call: JobArguments) -> int:
    from ddpm_pipeline.jobs.verify import run

    return run(settings_of(GenerateConfig, "generate", call).output)


def _features(call: JobArguments) -> int:
    from ddpm_pipeline.jobs.features import run_call

    return run_call(call)


def _evaluate(call: JobArguments) -> int:
    from ddpm_pipeline.jobs.evaluate import run_call

    return run_call(call)


def _print_where_to_look(call: JobArguments, seconds: float) -> None:
    from ddpm_pipeline.store import open_store
    from ddpm_pipeline.tracking import find_latest_run

    config = settings_of(GenerateConfig, "generate", call)
    sheet = Path(f"{PRESET}-contact-sheet.png")
    open_store(config.output).download("contact-sheet.png", LOCAL / sheet)
    echo("", f"done in {clock(seconds)}. Where to look:")
    echo(f"  contact sheet   {(LOCAL / sheet).resolve()}")
    echo(f"  samples         {config.output}")
    echo(f"  training run    {find_latest_run(key_prefix='train/')}")
    for line in sign_in(LOCAL):
        echo(f"  {line}")
    echo(f"  few steps       ddpm distill {PRESET}-fast   (a student that samples with 2 evaluations)")
    echo("  stop it all     ddpm down")


def _headline(number: int, title: str) -> None:
    echo("", f"[{number}/{NUM_PARTS}] {title}")


def _print_line(line: str) -> None:
    sys.stdout.write(f"  {line}\n")
    sys.stdout.flush()

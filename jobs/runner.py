"""What every command shares: arguments and settings, the dry run, errors and exit codes."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import yaml

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.distill_job import DistillConfig
from ddpm_pipeline.config.evaluation import EvaluateConfig, FeaturesConfig, PromoteConfig, TuneConfig
from ddpm_pipeline.config.generation import GenerateConfig, SampleConfig
from ddpm_pipeline.config.load import changed_settings, load_settings
from ddpm_pipeline.config.nights import NightlyConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.disk_errors import disk_error
from ddpm_pipeline.errors import DiskFull, OneLineError, Outage, UserError
from ddpm_pipeline.infra.local import export_environment
from ddpm_pipeline.infra.local.stack_state import read_state
from ddpm_pipeline.jobs.progress_bar import progress_of
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.telemetry.logs import as_json, set_up_logging
from ddpm_pipeline.telemetry.terminal import echo, echo_json
from ddpm_pipeline.tracking import TrackingError

log = logging.getLogger(__name__)
S = TypeVar("S", bound=Settings)

DONE, FAILED, REFUSED = 0, 1, 2
INTERRUPTED = 130
"""As the shell reports a process that ended on SIGINT."""
STOPPED = 143  # as the shell reports a process that ended on SIGTERM
LOCAL = Path(".local")
PROGRAM = ("-m", "ddpm_pipeline.jobs.cli")
"""What Python is given to run the command line where `ddpm` may not be on PATH."""
SECTIONS: dict[str, type[Settings]] = {
    "pack": PackConfig,
    "train": TrainConfig,
    "distill": DistillConfig,
    "generate": GenerateConfig,
    "sample": SampleConfig,
    "features": FeaturesConfig,
    "evaluate": EvaluateConfig,
    "tune": TuneConfig,
    "promote": PromoteConfig,
    "nightly": NightlyConfig,
}
"""The sections that a settings file may hold, one for each job, and their models."""
_COMMANDS = {"features": ("features", "train"), "tune": ("tune-sampler",)}
"""The jobs whose command is not called like their section of the settings."""


class JobEstimate(Protocol):
    """A dataclass that estimates what a job will need."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def lines(self) -> list[str]:
        """For people."""
        ...


@dataclass(frozen=True)
class JobArguments:
    """The words of one call of a job."""

    preset: str | None = None
    files: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()
    dry_run: bool = False
    as_json: bool = False

    @classmethod
    def of(
        cls, words: Sequence[str], config: Sequence[Path] = (), dry_run: bool = False, as_json: bool = False
    ) -> "JobArguments":
        """Sort free words into a preset (the first without '=') and key=value overrides."""
        presets = [word for word in words if "=" not in word]
        if len(presets) > 1:
            raise UserError(f"'{presets[1]}': a second preset; give one preset, then key=value settings")
        overrides = tuple(word for word in words if "=" in word)
        return cls(presets[0] if presets else None, tuple(config), overrides, dry_run, as_json)

    def words(self) -> list[str]:
        """The call as words again, as `ddpm JOB` takes them."""
        flags = (
            [f"--config={file}" for file in self.files]
            + ["--dry-run"] * self.dry_run
            + ["--json"] * self.as_json
        )
        return [*([self.preset] if self.preset else []), *self.overrides, *flags]


def presets() -> dict[str, Path]:
    """The presets that come with the program, by name."""
    folder = Path(str(files("ddpm_pipeline.jobs").joinpath("presets")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def preset_file(name: str) -> Path:
    """Path of a preset. Raises UserError naming the known ones."""
    known = presets()
    if name not in known:
        raise UserError(f"preset '{name}': unknown; known are {', '.join(known)}")
    return known[name]


def settings_of(model: type[S], section: str, call: JobArguments) -> S:
    """The resolved settings of a call: preset, then --config files, then overrides."""
    layers = [*([preset_file(call.preset)] if call.preset else []), *call.files]
    return load_settings(model, section, layers, call.overrides, sections=tuple(SECTIONS), presets=presets())


def given_settings(
    model: type[S], section: str, given: S | str | Path | None, values: Mapping[str, object]
) -> S:
    """Settings as callers in Python give them: an object, the name of a preset or the path of a settings file, or
    nothing, and single values that win. Raises UserError as the command line does.
    """
    if isinstance(given, Settings):
        return changed_settings(given, section, values) if values else given
    layers = [preset_file(given)] if isinstance(given, str) else [] if given is None else [given]
    return load_settings(model, section, layers, sections=tuple(SECTIONS), presets=presets(), values=values)


def preset_uses_gpus(call: JobArguments) -> bool:
    """Whether the generation of the call's preset, with its --config files, samples on GPUs."""
    if call.preset is None:
        return False
    asked = JobArguments(preset=call.preset, files=call.files)
    try:
        return settings_of(GenerateConfig, "generate", asked).gpus_per_worker > 0
    except UserError:  # this preset generates nothing
        return False


def command_of(section: str) -> tuple[str, ...]:
    """The words after `ddpm`, or after `python -m ddpm_pipeline.jobs.cli`, that run the job of a settings section."""
    return _COMMANDS.get(section, (section,))


def use_running_stack() -> None:
    """Point this process at the working directory's local stack, if it has one; the user's variables win."""
    if read_state(LOCAL) is not None:
        export_environment(LOCAL)


def handle_errors(work: Callable[[], int]) -> int:
    """Run `work`; a UserError becomes one line and exit code 2; damage, an outage, a full disk one and 1."""
    set_up_logging()
    try:
        return work()
    except (OneLineError, TrackingError) as error:
        found = error
    except OSError as error:
        found = disk_error(error)
        if found is None:
            raise
    except (RuntimeError, AssertionError) as error:
        found = _unfit_machine(error)
        if found is None:
            raise
    refused = isinstance(found, UserError) and not isinstance(found, (Outage, DiskFull))
    _print_error("error" if refused else "failed", found)
    return REFUSED if refused else FAILED


def _unfit_machine(error: Exception) -> UserError | None:
    """The error for a GPU that this machine's driver or torch cannot use, in one line; None if it is none."""
    from ddpm_pipeline.devices.remedies import (  # imports torch, as what raised the error did
        fact_of,
        unfit_remedy,
    )

    remedy = unfit_remedy(error)
    return None if remedy is None else UserError(f"this machine: {fact_of(error)}; {remedy}")


def _print_error(kind: str, error: Exception) -> None:
    """Report in one line what ended a job, without the secrets that an address may hold."""
    if as_json():
        log.error("%s: %s", kind, error)
    else:
        echo(f"{kind}: {error}", error=True)


def run_job(
    section: str,
    model: type[S],
    run: Callable[[S, Progress], int],
    call: JobArguments,
    *,
    unit: str,
    estimate: Callable[[S], JobEstimate] | None = None,
) -> int:
    """Resolve the settings of a call and run the job on them. A dry run only prints them, with the job's `estimate`."""

    def work() -> int:
        use_running_stack()
        config = settings_of(model, section, call)
        if call.dry_run:
            print_settings(
                {section: config.model_dump(mode="json")}, call.as_json, estimate and estimate(config)
            )
            return DONE
        with progress_of(section, unit) as progress:
            return run(config, progress)

    return handle_errors(work)


def print_settings(content: Mapping[str, object], as_json: bool, estimate: JobEstimate | None = None) -> None:
    """Settings as YAML that can be given back by --config, with the estimate as comments; or both as JSON."""
    if as_json:
        extra = {} if estimate is None else {"estimate": asdict(estimate)}
        echo_json({**content, **extra})
        return
    echo(*yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True).splitlines())
    echo(*(f"# {line}" for line in ([] if estimate is None else estimate.lines())))

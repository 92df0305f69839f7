"""Verification of an output prefix: `ddpm verify s3://bucket/prefix --regenerate 16`."""

import dataclasses

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.regenerate import regenerate
from ddpm_pipeline.generate.verification import VerifyReport, discard_damaged, verify
from ddpm_pipeline.jobs.progress_bar import progress_of
from ddpm_pipeline.jobs.ray_map import ray_workers
from ddpm_pipeline.jobs.runner import DONE, FAILED, REFUSED, use_running_stack
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.signatures import PublicKey
from ddpm_pipeline.telemetry.terminal import echo, echo_json

_SHOWN = 50


def run(
    prefix: str,
    num_regenerate: int = 0,
    model: str | None = None,
    as_json: bool = False,
    discard: bool = False,
    key: str | None = None,
    signed_for: str | None = None,
    num_workers: int = 0,
) -> int:
    """Verify and print the report; with `discard`, delete the records of damaged shards; with `key`, check the
    signature.

    Exit code 2 if nothing is wrong, but samples could not be judged here, which another kind of worker can do.
    """
    use_running_stack()
    with progress_of("verify", "shards") as progress:
        report = examine(prefix, progress, key, signed_for, num_workers)
    if num_regenerate:
        with progress_of("regenerate", "samples") as progress:
            regenerate_where_possible(report, num_regenerate, model, progress)
    if discard and discard_damaged(report):
        report.notes.append(f"the records of {len(report.damaged):,} damaged shards are deleted")
    if as_json:
        content = dataclasses.asdict(report) | {"spec": report.spec.model_dump(mode="json"), "ok": report.ok}
        echo_json(content)
    else:
        echo(*lines(report, discarded=discard))
    return FAILED if not report.ok else REFUSED if report.not_judged else DONE


def examine(
    prefix: str,
    progress: Progress,
    key: str | None = None,
    signed_for: str | None = None,
    num_workers: int = 0,
) -> VerifyReport:
    """Verify every object and, with the public key in the file `key`, the signature; in `num_workers` Ray tasks at a
    time, or here."""
    public = None if key is None else PublicKey.read(key)
    if public is None and signed_for is not None:
        raise UserError("--signed-for: has no effect without --key; add the public key")
    if num_workers == 0:
        return verify(prefix, progress, public, signed_for)
    with ray_workers(num_workers, "verify") as shard_map:
        return verify(prefix, progress, public, signed_for, shard_map)


def regenerate_where_possible(
    report: VerifyReport, count: int, model: str | None, progress: Progress
) -> None:
    """Sample some images again and add the comparison to the report: here, or for a generation on GPUs on a worker of
    the recorded kind, in the cluster that RAY_ADDRESS names, as this machine may have no GPU.
    """
    if report.spec.device != "cuda":
        regenerate(report, count, model, progress=progress)
        return
    from ddpm_pipeline.jobs.ray_session import ray_cluster

    with ray_cluster():
        from ddpm_pipeline.generate.regenerate_on_gpu import (
            compare_on_gpu,  # imports Ray; see ddpm_pipeline.jobs.ray_session
        )

        regenerate(report, count, model, progress=progress, compare=compare_on_gpu)


def lines(report: VerifyReport, discarded: bool = False) -> list[str]:
    """The report, one fact per line."""
    verdict = "sound and complete" if report.ok else "NOT sound" if report.num_problems else "not complete"
    out = [
        f"{verdict}: {report.output}",
        f"checked  {report.samples_checked:,} of {report.spec.count:,} samples in {report.shards_checked:,} shards, "
        f"{report.seconds:.1f} s",
    ]
    if report.signed_by is not None and report.ok:
        out.append(f"signed   by key {report.signed_by}")
    if report.regenerated:
        out.append(f"remade   {report.regenerated:,} samples and compared their bytes")
    if report.not_judged:
        out.append(f"unjudged {report.not_judged:,} samples: {report.not_judged_because}")
    out += [f"note     {note}" for note in report.notes]
    out += [f"problem  {p.object}: {p.what}" for p in report.problems[:_SHOWN]]
    if report.num_problems > _SHOWN:
        out.append(f"         … {report.num_problems - _SHOWN:,} more problems")
    return out + next_steps(report, discarded)


def next_steps(report: VerifyReport, discarded: bool = False) -> list[str]:
    """What to do next, one step per line."""
    if report.ok:
        return [f"next     ddpm evaluate PRESET --prefix {report.output}"]
    steps: list[str] = []
    if report.foreign:
        steps.append(
            f"next     move away objects that do not belong to the generation, such as {report.foreign[0]}"
        )
    if report.damaged and not discarded:
        steps.append(f"next     ddpm verify {report.output} --discard-damaged")
    if not report.complete or report.num_problems > len(report.foreign):
        steps.append(
            f"next     the same `ddpm generate` command (count={report.spec.count}) makes what is missing"
        )
    return steps

"""Verification of an output prefix: `python -m jobs.verify s3://bucket/prefix --regenerate 16`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from jobs.progress_bar import progress_of
from jobs.runner import DONE, FAILED, handle_errors, use_running_stack
from pipeline.generate.regenerate import regenerate
from pipeline.generate.verification import VerifyReport, discard_damaged, verify
from pipeline.telemetry.terminal import echo, echo_json

_SHOWN = 50


def main(argv: Sequence[str] | None = None) -> int:
    """Prefix in, exit code out: 0 sound and complete, 1 not, 2 refused."""
    parser = argparse.ArgumentParser(prog="python -m jobs.verify")
    parser.add_argument("prefix", help="output prefix of a generation, s3://… or file:///…")
    parser.add_argument(
        "--regenerate", type=int, default=0, metavar="K", help="make K samples again and compare"
    )
    parser.add_argument("--model", help="the network, for --regenerate of one that came from a folder")
    parser.add_argument("--discard-damaged", action="store_true", help="delete the records of damaged shards")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    told = parser.parse_args(argv)
    return handle_errors(
        lambda: run(told.prefix, told.regenerate, told.model, told.json, told.discard_damaged)
    )


def run(
    prefix: str,
    num_regenerate: int = 0,
    model: str | None = None,
    as_json: bool = False,
    discard: bool = False,
) -> int:
    """Verify and print what was found; with `discard`, make room for damaged shards to be made again."""
    use_running_stack()
    with progress_of("verify", "shards") as progress:
        report = verify(prefix, progress)
    if num_regenerate:
        with progress_of("regenerate", "samples") as progress:
            regenerate(report, num_regenerate, model, progress=progress)
    if discard and discard_damaged(report):
        report.notes.append(f"the records of {len(report.damaged):,} damaged shards are deleted")
    if as_json:
        content = dataclasses.asdict(report) | {"spec": report.spec.model_dump(mode="json"), "ok": report.ok}
        echo_json(content)
    else:
        echo(*lines(report, discarded=discard))
    return DONE if report.ok else FAILED


def lines(report: VerifyReport, discarded: bool = False) -> list[str]:
    """The report, a line a fact."""
    verdict = "sound and complete" if report.ok else "NOT sound" if report.num_problems else "not complete"
    out = [
        f"{verdict}: {report.output}",
        f"checked  {report.samples_checked:,} of {report.spec.count:,} samples in {report.shards_checked:,} shards, "
        f"{report.seconds:.1f} s",
    ]
    if report.regenerated:
        out.append(f"remade   {report.regenerated:,} samples and compared their bytes")
    out += [f"note     {note}" for note in report.notes]
    out += [f"problem  {p.object}: {p.what}" for p in report.problems[:_SHOWN]]
    if report.num_problems > _SHOWN:
        out.append(f"         … {report.num_problems - _SHOWN:,} more problems")
    return out + next_steps(report, discarded)


def next_steps(report: VerifyReport, discarded: bool = False) -> list[str]:
    """What to do about what was found, a line a step."""
    if report.ok:
        return [f"next     ddpm evaluate PRESET --prefix {report.output}"]
    steps: list[str] = []
    if report.foreign:
        steps.append(f"next     move away what is not the generation's, such as {report.foreign[0]}")
    if report.damaged and not discarded:
        steps.append(f"next     ddpm verify {report.output} --discard-damaged")
    if not report.complete or report.num_problems > len(report.foreign):
        steps.append(
            f"next     the same `ddpm generate` command (count={report.spec.count}) makes what is missing"
        )
    return steps


if __name__ == "__main__":
    sys.exit(main())

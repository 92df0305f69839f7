"""`ddpm doctor`: checks everything that a job needs, with a remedy for each fault."""

import dataclasses

from ddpm_pipeline.jobs.cluster_address import settle_address
from ddpm_pipeline.jobs.doctor_checks import all_checks
from ddpm_pipeline.jobs.doctor_findings import Finding
from ddpm_pipeline.jobs.runner import DONE, FAILED, use_running_stack
from ddpm_pipeline.telemetry.terminal import echo, echo_json


def doctor(as_json: bool = False, write: bool = False) -> int:
    """Make every check, print a line for each; exit code 1 when one found a problem.

    `write` also writes, reads back and deletes a small object in the data root, which some roles may not.
    """
    use_running_stack()
    settle_address()
    findings: list[Finding] = []
    for check in all_checks(write):
        found = check()
        new = found if isinstance(found, list) else [found]
        findings += new
        if not as_json:
            echo(*(line for finding in new for line in _lines(finding)))
    problems = sum(not finding.ok for finding in findings)
    if as_json:
        echo_json([dataclasses.asdict(finding) for finding in findings])
    elif problems:
        echo(f"{problems} problem{'s' * (problems != 1)}")
    else:
        echo("next     ddpm pack digits   (or, all at once: ddpm demo)")
    return FAILED if problems else DONE


def _lines(finding: Finding) -> list[str]:
    """A finding as it is printed: the fact, and below it the remedy."""
    head = f"{'ok' if finding.ok else 'PROBLEM':<8} {finding.name:<14} {finding.found}"
    return [head, f"{'':<8} {'do':<14} {finding.remedy}"] if finding.remedy else [head]

"""Status of the local stack, or of a generation from its prefix alone."""

import dataclasses

from ddpm_pipeline.generate import generation_status as status
from ddpm_pipeline.generate.generation_status import GenerationStatus
from ddpm_pipeline.infra.local import LocalStack, sign_in
from ddpm_pipeline.jobs.overview import disk_of, jobs_of_cluster, nights_of_root, overview_lines, versions
from ddpm_pipeline.jobs.progress_bar import clock
from ddpm_pipeline.jobs.runner import DONE, FAILED, LOCAL, use_running_stack
from ddpm_pipeline.telemetry.terminal import echo, echo_json


def stack_status(as_json: bool) -> int:
    """Print a line for each service, then jobs, nights, disk and versions; exit code 1 if a service that should run
    does not.
    """
    rows = LocalStack(LOCAL).status()
    facts = {
        "jobs": jobs_of_cluster(),
        "nights": nights_of_root(),
        "disk": disk_of(LOCAL),
        "versions": versions(),
    }
    if as_json:
        services = [{"service": r.service, "state": r.state, "url": r.url, "pid": r.pid} for r in rows]
        echo_json({"services": services, **facts})
    else:
        for row in rows:
            echo(
                f"{row.service:<8} {row.state:<14} {row.pid or '-':<8} {row.url:<28} {row.log or ''}".rstrip()
            )
        echo(*sign_in(LOCAL))
        echo(*overview_lines(facts))
    healthy = all(row.state in ("running", "external") for row in rows)
    if not healthy and not as_json:
        echo("next     ddpm up")
    return DONE if healthy else FAILED


def generation_status(prefix: str, as_json: bool) -> int:
    """Print the status of the generation at a prefix. UserError if there is no generation at it."""
    use_running_stack()
    found = status.generation_status(prefix)
    if as_json:
        facts = dataclasses.asdict(dataclasses.replace(found, jobs=(), cost=None))
        cost = None if found.cost is None else found.cost.model_dump(mode="json", exclude={"price"})
        echo_json(facts | {"spec": found.spec.model_dump(mode="json"), "cost": cost})
    else:
        echo(*_lines(found))
    return FAILED if found.state == "damaged" else DONE


def _lines(found: GenerationStatus) -> list[str]:
    """The status, one fact per line."""
    lines = [
        f"{found.state}: {found.output}",
        f"images   {found.images_done:,} of {found.spec.count:,}",
        f"shards   {found.shards_done:,} of {found.num_shards:,}, {found.shards_under_way} in progress",
    ]
    if found.images_per_second:
        left = f", ETA {clock(found.eta_seconds)}" if found.eta_seconds is not None else ""
        lines.append(f"speed    {found.images_per_second:,.1f} images/s{left}")
    if found.cost is not None:
        lines.append(f"cost     {found.cost.text()}")
    lines += [f"failed   {shard}: {error}" for shard, error in found.failed.items()]
    lines += [f"problem  {fault}" for fault in found.faults]
    if found.num_faults > len(found.faults):
        lines.append(f"         … {found.num_faults - len(found.faults):,} more problems")
    if found.state in ("not complete", "damaged"):
        lines.append("next     the same `ddpm generate` command makes what is missing")
    return lines

"""The stack without the rest of the command line.

    python -m ddpm_pipeline.infra.local up|status|down|env|remove|guard

`remove` also deletes all data; `guard --pid N` does so once process N has ended (for tests).
"""

import argparse
import shlex
import sys
from pathlib import Path

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import processes
from ddpm_pipeline.infra.local.client_environment import environment, sign_in
from ddpm_pipeline.infra.local.stack import LocalStack
from ddpm_pipeline.telemetry.terminal import echo


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 for success, 1 where `status` finds something stopped, 2 for a user's error."""
    parser = argparse.ArgumentParser(prog="python -m ddpm_pipeline.infra.local", description=__doc__)
    parser.add_argument("command", choices=["up", "status", "down", "env", "remove", "guard"])
    parser.add_argument(
        "--root", type=Path, default=Path(".local"), help="where state, data and logs are kept"
    )
    parser.add_argument("--store", choices=["s3", "file"], help="object store; default: as before, first s3")
    parser.add_argument("--num-cpus", type=int, help="logical CPUs of the Ray head; default: the cores")
    parser.add_argument("--pid", type=int, help="guard: the process whose end is the stack's end")
    options = parser.parse_args(argv)
    try:
        return _run(options)
    except UserError as error:
        echo(f"error: {error}", error=True)
        return 2


def _print_line(line: str) -> None:
    echo(line)  # one write: services report from several threads


def _run(options: argparse.Namespace) -> int:
    stack = LocalStack(options.root, store=options.store, num_cpus=options.num_cpus)
    match options.command:
        case "up":
            stack.up(report=_print_line)
            echo(*sign_in(options.root))
        case "down":
            echo(f"ended: {', '.join(stack.down()) or 'nothing was running'}")
        case "remove":
            stack.remove()
        case "guard":
            processes.wait_for_end(options.pid)
            stack.remove()
        case "env":
            for name, value in environment(options.root).items():
                print(f"export {name}={shlex.quote(value)}")  # noqa: T201 - secrets, for the calling shell
        case _:
            rows = stack.status()
            for row in rows:
                echo(f"{row.service:<8} {row.state:<14} {row.pid or '-':<8} {row.url:<28} {row.log or ''}")
            return int(any(row.state not in ("running", "external") for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Coverage-guided fuzzing of one reader: `python -m tests.fuzz tar --seconds 60`, or of all of them in turn.

What makes a reader do anything but take or refuse its bytes is written to tests/fuzz/corpus/<reader>/, where the
tests find it from then on. Needs the extra `fuzz` (atheris; Linux).
"""

import argparse
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import atheris

import ddpm_pipeline
from tests.fuzz.readers import NAMES

CORPUS = Path(__file__).parent / "corpus"
MOST_MEGABYTES = 3000
SLOWEST_SECONDS = 20

INSTRUMENTED = [ddpm_pipeline.__name__, "tarfile", "yaml", "PIL", "json"]


def main(argv: Sequence[str] | None = None) -> int:
    """0 when nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("readers", nargs="*", default=list(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.in_this_process:
        _fuzz(options.readers[0], options.seconds)
    found = 0
    for name in options.readers:
        # libFuzzer ends its process, so each reader has one of its own
        word = [sys.executable, "-m", "tests.fuzz", name, f"--seconds={options.seconds}", "--in-this-process"]
        done = subprocess.run(word, capture_output=True, text=True, check=False)
        said = [
            line for line in done.stderr.splitlines() if line.startswith(("Done ", "stat::number_of_exec"))
        ]
        print(
            f"{name:<18} {'finding, see above' if done.returncode else 'nothing found'}  {' '.join(said)}",
            flush=True,
        )
        if done.returncode:
            found += 1
            print(done.stderr[-3000:])
    return 1 if found else 0


def _fuzz(name: str, seconds: int) -> None:
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.targets import all_targets
    with all_targets() as targets, tempfile.TemporaryDirectory() as seeds:
        target = targets[name]
        (Path(seeds) / "sound").write_bytes(target.sound)

        def one(data: bytes) -> None:
            try:
                target.refuses_or_takes(data)
            except Exception:
                traceback.print_exc()
                raise

        findings = CORPUS / name.replace(" ", "_")
        findings.mkdir(parents=True, exist_ok=True)
        limits = [
            f"-max_total_time={seconds}",
            f"-timeout={SLOWEST_SECONDS}",
            f"-rss_limit_mb={MOST_MEGABYTES}",
        ]
        atheris.Setup(
            [
                sys.argv[0],
                seeds,
                *limits,
                "-print_final_stats=1",
                f"-artifact_prefix={findings}/",
                "-max_len=65536",
            ],
            one,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())

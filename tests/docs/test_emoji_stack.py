"""The example from a font to a gallery of samples, with few pictures and few steps."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_pipeline.infra.local import LocalStack
from tests.docs.lines import REPOSITORY

SCRIPT = REPOSITORY / "examples/emoji/run.sh"
MISSING = runpy.run_path(str(SCRIPT.with_name("render.py")))["missing"]()
TRIAL = (
    "steps=4",
    "global_batch=16",
    "optimizer.warmup_steps=1",
    "log_every_steps=2",
    "checkpoint.every_steps=4",
    "grid.every_steps=4",
    "grid.count=9",
    "grid.sampler.num_steps=2",
)

pytestmark = [
    pytest.mark.stack,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


def run(folder: Path) -> str:
    """What the script prints, in a folder whose stack is the session's."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = os.environ | {"LIMIT": "4", "COUNT": "18", "PATH": programs, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [SCRIPT, *TRIAL], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_script_leads_from_a_font_to_a_gallery_and_finds_all_done_the_second_time(
    stack: LocalStack, tmp_path: Path
) -> None:
    (tmp_path / ".local").symlink_to(stack.root)
    said = run(tmp_path)
    assert "36 images in emoji" in said
    assert re.search(r"emoji-32@champion", said)
    assert "18 images in 1 shards" in said
    assert (tmp_path / "emoji-gallery/index.html").is_file()
    again = run(tmp_path)
    assert "already trained" in again
    assert "already complete" in again

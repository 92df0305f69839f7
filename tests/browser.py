"""Headless Chromium, for the tests that look at pages as a person would."""

import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no chromium to look at the page with")
_SECONDS = 200


def screenshot(
    address: str, image: Path, *, width: int = 1200, height: int = 1000, dark: bool = False
) -> None:
    """Write what a window of this size shows as a PNG."""
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    size = f"--window-size={width},{height}"
    _run(image.parent, *scheme, size, "--hide-scrollbars", f"--screenshot={image}", address)


def document(address: str, scratch: Path) -> str:
    """The document as it is after its scripts have run."""
    return _run(scratch, "--virtual-time-budget=2000", "--dump-dom", address)


def _run(scratch: Path, *words: str) -> str:
    assert PROGRAM is not None
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={scratch}/profile")
    done = subprocess.run([PROGRAM, *fixed, *words], check=True, capture_output=True, timeout=_SECONDS)
    return done.stdout.decode()

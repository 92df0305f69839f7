"""A command that meets a GPU, driver or compiler that does not fit says so in one line; a bug keeps its trace."""

from collections.abc import Callable

import pytest

from ddpm_pipeline.jobs.runner import REFUSED, handle_errors


def raising(error: Exception) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


def test_what_the_installation_lacks_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError(
        "CUDA error: no kernel image is available for execution on the device\nFor debugging …"
    )
    assert handle_errors(raising(error)) == REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: this machine: CUDA error: no kernel image is available")
    assert "compute capability" in line


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        handle_errors(raising(RuntimeError("a bug")))

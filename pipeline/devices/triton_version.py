"""Whether Triton's kernels run in this process, and which version compiles them."""

import logging
from functools import cache
from subprocess import CalledProcessError

log = logging.getLogger(__name__)


@cache
def triton_version() -> str | None:
    """Version of Triton where it can launch kernels on this process's GPU; None otherwise, with a warning that says
    why.

    Triton comes with CUDA builds of torch. It compiles its launcher once a machine, for which it needs a C compiler and
    Python's headers.
    """
    try:
        import triton
        from triton.runtime import driver

        driver.active.get_current_target()
    except (
        ImportError,
        RuntimeError,
        OSError,
        CalledProcessError,
        AttributeError,
        AssertionError,  # of Triton, where the dynamic linker does not know libcuda
    ) as error:
        log.warning(
            "Triton cannot launch kernels here (%s): random numbers and group norms take slower paths. "
            "It needs a C compiler (gcc) and Python's headers.",
            " ".join(str(error).split()),
        )
        return None
    return triton.__version__

"""Every statement about the program on a simulated CUDA device: `python -m tests.cuda.checks [NAME...]`

Prints JSON: for each, its traceback, or null if it holds.
"""

import inspect
import json
import sys
import traceback
from collections.abc import Callable

from tests.cuda import sampling_checks, training_checks

import torch  # isort: skip


def _statements() -> dict[str, Callable[[], None]]:
    return {
        name: found
        for module in (training_checks, sampling_checks)
        for name, found in inspect.getmembers(module, inspect.isfunction)
        if found.__module__ == module.__name__ and not name.startswith("_")
    }


def _outcome(statement: Callable[[], None]) -> str | None:
    try:
        statement()
    except Exception:  # noqa: BLE001  (told to the test that started this process)
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    statements = _statements()
    print(json.dumps({name: _outcome(statements[name]) for name in sys.argv[1:] or statements}, indent=2))

"""Torch without its compiler, for trainings that compile nothing.

Torch's optimizers, DDP and the meta device import torch's compiler only to tell it to leave a function alone: 0.6 CPU
seconds, 300 modules and 37 MB in each worker. In its place stands a module that knows what they ask. Asked anything
else, it imports the compiler, which takes its place: a plug-in may compile, and a torch that asks more only starts
later.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import torch

COMPILER = "torch._dynamo"
_CACHE = "__dynamo_disable"
"""Attribute in which torch keeps what `disable` returned for a function."""
F = TypeVar("F", bound=Callable[..., Any])


def leave_out_compiler() -> None:
    """Let torch import its compiler no earlier than something is compiled. Does nothing where it is imported."""
    if COMPILER not in sys.modules:
        absent = _AbsentCompiler(COMPILER)
        sys.modules[COMPILER] = absent
        torch._dynamo = absent  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


class _AbsentCompiler(ModuleType):
    """What torch asks of its compiler where it compiles nothing, with the compiler's own answers."""

    trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)
    utils = SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer")

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._left_alone: list[Callable[..., Any]] = []

    def disable(self, function: F, recursive: bool = True, wrapping: bool = True) -> F:
        """The function itself: nothing would compile it."""
        self._left_alone.append(function)
        return function

    def graph_break(self, msg: str = "") -> None:
        """Nothing: there is no graph."""

    def __getattr__(self, name: str) -> Any:
        """Of the compiler, which is imported in this module's place."""
        if (
            name.startswith("__") and name != "__path__"
        ):  # asked of every module; the path by an import below it
            raise AttributeError(name)
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER], torch._dynamo  # pyright: ignore[reportPrivateUsage]
            for function in self._left_alone:  # from now on the compiler has to be told
                vars(function).pop(_CACHE, None)
        return getattr(import_module(COMPILER), name)

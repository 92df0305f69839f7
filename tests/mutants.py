"""Whether the tests notice changes of the code that promises rest on: `make mutants`, or

    python -m tests.mutants [MODULE...] [--sample 20] [--jobs 2] [--seed 0] [--out FILE]

cosmic-ray changes one place of a module at a time (an operator, a number, a condition …), in a clone of the last
commit, and the tests of that module run. A change that no test notices survives, and is printed: it either shows a test
that is missing, or changes nothing (an equivalent mutant), which a person must decide.

Modules are tried alike: a sample of each, drawn by the seed. The tests run in processes forked from one that has
imported what is slow to import. They end at the first failure, or when they take SLOWER times as long as without a
change, which counts as noticed.
"""

import argparse
import ast
import difflib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[1]
PACKAGE = "ddpm_pipeline"
SLOWER = 5
LIMIT_SECONDS = 1200
"""For tests without a change."""
TOOLS = ("cosmic-ray==8.7.0", "parso==0.8.7", "stevedore==5.10.0", "exit-codes==1.3.0", "toml==0.10.2")

SAMPLER_TESTS = (
    "tests/diffusion/test_samplers.py",
    "tests/diffusion/test_ideal.py",
    "tests/diffusion/test_against_diffusers.py",
)
RECORD_TESTS = (
    "tests/generate/test_ledger.py",
    "tests/generate/test_cost.py",
    "tests/generate/test_documents.py",
)
TARGETS: dict[str, tuple[str, ...]] = {
    "diffusion/schedule.py": ("tests/diffusion/test_schedule.py",),
    "diffusion/noise.py": ("tests/diffusion/test_noise.py",),
    "diffusion/targets.py": ("tests/diffusion/test_objective.py", "tests/diffusion/test_samplers.py"),
    "diffusion/objective.py": ("tests/diffusion/test_objective.py",),
    "diffusion/samplers.py": (*SAMPLER_TESTS, "tests/diffusion/test_consistency.py"),
    "diffusion/multistep.py": SAMPLER_TESTS,
    "diffusion/timesteps.py": SAMPLER_TESTS,
    "diffusion/consistency.py": ("tests/diffusion/test_consistency.py",),
    "data/reading/order.py": ("tests/data/test_order.py",),
    "generate/plan.py": ("tests/generate/test_plan.py",),
    "generate/done_records.py": RECORD_TESTS,
    "generate/manifest.py": RECORD_TESTS,
    "train/checkpoint.py": ("tests/train/test_checkpoint.py", "tests/train/test_checkpoint_eval.py"),
    "features/exact_sums.py": ("tests/evaluate/test_sums.py",),
    "evaluate/gate.py": (
        "tests/evaluate/test_gate.py",
        "tests/evaluate/test_gate_cost.py",
        "tests/evaluate/test_membership.py",
    ),
}
"""Modules, and the tests that have to notice."""

SWAPS = (
    "Add_Sub", "Sub_Add", "Mul_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Sub", "Pow_Mul", "BitAnd_BitOr",
    "BitOr_BitAnd", "BitXor_BitAnd", "LShift_RShift", "RShift_LShift",
)  # fmt: skip
COMPARISONS = ("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Is_IsNot", "IsNot_Is")
OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{name}" for name in SWAPS),
    *(f"core/ReplaceComparisonOperator_{name}" for name in COMPARISONS),
    "core/ReplaceUnaryOperator_Delete_USub",
    "core/ReplaceUnaryOperator_Delete_Not",
    "core/AddNot",
    "core/ReplaceTrueWithFalse",
    "core/ReplaceFalseWithTrue",
    "core/ReplaceAndWithOr",
    "core/ReplaceOrWithAnd",
    "core/ReplaceBreakWithContinue",
    "core/ReplaceContinueWithBreak",
    "core/NumberReplacer",
    "core/ZeroIterationForLoop",
)
"""One replacement for each operator of the language: others of the same place are noticed alike."""


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    operator: str
    occurrence: int


@dataclass(frozen=True)
class Outcome:
    """What the tests said to a mutant."""

    mutant: Mutant
    noticed: bool
    change: str
    """The changed lines."""
    seconds: float


def main() -> int:
    """Try the mutants and print those that survived; 1 if any did."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", choices=[*TARGETS, []], help="by default all")
    parser.add_argument("--sample", type=int, default=20, help="mutants of each module")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for all outcomes, as JSON")
    parser.add_argument("--tools", type=Path, default=ROOT / ".mutants", help="folder for cosmic-ray")
    told = parser.parse_args()
    _use_tools(told.tools.resolve())
    with tempfile.TemporaryDirectory(prefix="ddpm-mutants-") as scratch:
        clones = [_clone(Path(scratch) / str(number)) for number in range(told.jobs)]
        chosen = [
            mutant
            for module in told.modules or TARGETS
            for mutant in _sample(clones[0], module, told.sample, told.seed)
        ]
        _import_slow_modules()
        limits: dict[str, float] = {}
        for module in told.modules or TARGETS:
            began = time.monotonic()
            if not _tests_pass(clones[0], TARGETS[module], LIMIT_SECONDS):
                parser.error(f"{module}: its tests fail without a change")
            limits[module] = SLOWER * (time.monotonic() - began)
            print(f"{module}: its tests take {limits[module] / SLOWER:.0f} s", flush=True)
        outcomes = list(_outcomes(chosen, clones, limits))
    if told.out is not None:
        told.out.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    return _report(outcomes)


def _clone(folder: Path) -> Path:
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(folder)], check=True)
    return folder


def _sample(clone: Path, module: str, count: int, seed: int) -> list[Mutant]:
    text = (clone / PACKAGE / module).read_text()
    plain = _executed(text)
    places = list(_places(text))
    random.Random(f"{seed} {module}").shuffle(places)
    drawn: list[Mutant] = []
    for operator, occurrence in places:
        changed = _mutated(text, operator, occurrence)
        assert changed is not None
        if _executed(changed) not in (plain, None):
            drawn.append(Mutant(module, operator, occurrence))
        if len(drawn) == count:
            break
    print(f"{module}: {len(drawn)} mutants, in {len(places)} places", flush=True)
    return drawn


def _places(text: str) -> Iterator[tuple[str, int]]:
    """Each operator, with the number of each place where it changes the text."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    nodes = list(ast_nodes(get_ast(text)))
    for name in OPERATORS:
        operator = get_operator(name)()
        found = sum(len(list(operator.mutation_positions(node))) for node in nodes)
        yield from ((name, occurrence) for occurrence in range(found))


def _mutated(text: str, operator: str, occurrence: int) -> str | None:
    """A module's text after the change; None if there are fewer occurrences."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    return mutate_code(text, get_operator(operator)(), occurrence)


def _executed(text: str) -> str | None:
    """A module without its annotations, a change of which is none. None if it is no Python: cosmic-ray takes a `*`
    between parameters for a product."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(0)
    return ast.unparse(tree)


def _import_slow_modules() -> None:
    """What tests import, but nothing of the program: that is read anew, changed, in each process."""
    import boto3  # noqa: F401
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    assert not any(name.partition(".")[0] in (PACKAGE, "pipeline") for name in sys.modules)


def _outcomes(mutants: list[Mutant], clones: list[Path], limits: dict[str, float]) -> Iterator[Outcome]:
    free: SimpleQueue[Path] = SimpleQueue()
    for clone in clones:
        free.put(clone)

    def tried(mutant: Mutant) -> Outcome:
        clone = free.get()
        try:
            return _try(mutant, clone, limits[mutant.module])
        finally:
            free.put(clone)

    with ThreadPoolExecutor(len(clones)) as pool:
        for number, outcome in enumerate(pool.map(tried, mutants), start=1):
            if not outcome.noticed:
                print(f"survived: {outcome.mutant.module}\n{outcome.change}", flush=True)
            if number % 20 == 0:
                print(f"{number}/{len(mutants)} mutants", flush=True)
            yield outcome


def _try(mutant: Mutant, clone: Path, limit_seconds: float) -> Outcome:
    file = clone / PACKAGE / mutant.module
    before = file.read_text()
    after = _mutated(before, mutant.operator, mutant.occurrence)
    assert after is not None
    file.write_text(after)
    began = time.monotonic()
    try:
        noticed = not _tests_pass(clone, TARGETS[mutant.module], limit_seconds)
    finally:
        file.write_text(before)
    return Outcome(mutant, noticed, _change(before, after), time.monotonic() - began)


def _tests_pass(clone: Path, tests: tuple[str, ...], limit_seconds: float) -> bool:
    child = os.fork()
    if child == 0:
        os.setsid()  # so that what the tests start can be ended with them
        _run_tests(clone, tests)
    deadline = time.monotonic() + limit_seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _run_tests(clone: Path, tests: tuple[str, ...]) -> None:
    """In a forked process: run the tests of a clone and end with pytest's code."""
    code = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        os.chdir(clone)
        sys.dont_write_bytecode = True
        sys.path[:] = [str(clone), *(path for path in sys.path if path not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        os.environ["PYTHONPATH"] = str(clone)
        import pytest

        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
    finally:
        os._exit(code)


def _change(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def _report(outcomes: list[Outcome]) -> int:
    for module in dict.fromkeys(outcome.mutant.module for outcome in outcomes):
        own = [outcome.noticed for outcome in outcomes if outcome.mutant.module == module]
        print(f"{module:28} {sum(own):3} of {len(own):3} noticed")
    noticed = sum(outcome.noticed for outcome in outcomes)
    print(f"{noticed} of {len(outcomes)} mutants noticed ({noticed / max(1, len(outcomes)):.1%})")
    return int(noticed < len(outcomes))


def _use_tools(folder: Path) -> None:
    """Make cosmic-ray importable from `folder`, where it is installed first, without what else it asks for."""
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*command, str(folder.with_suffix(".part")), *TOOLS], check=True)
        folder.with_suffix(".part").rename(folder)
    sys.path.append(str(folder))


if __name__ == "__main__":
    raise SystemExit(main())

"""Write the pinned requirements from what is installed: `python -m infra.lock` (`make lock`).

requirements.lock holds what the pipeline and the local stack need, requirements-dev.lock what the checks need
besides. Every package is followed through the metadata of the installed ones, for each Python and platform the
project supports; where one is needed on some of them only, its line says so in a marker. There are no hosts, no
local version labels (a CPU build's `+cpu`) and no CUDA packages: the build of torch that pip finds names its own.
"""

import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from importlib import metadata
from itertools import product
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = (("linux", "Linux", "x86_64"), ("linux", "Linux", "aarch64"), ("darwin", "Darwin", "arm64"))
_HEAD = "# Written by `make lock` from the installed packages; do not edit.\n"
_WITH_TORCH = re.compile(r"^(nvidia-|cuda-|triton$)")

Place = dict[str, str]


def places() -> list[Place]:
    """Marker variables of every supported Python on every supported platform."""
    return [
        {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "implementation_version": f"{python}.0",
            "os_name": "posix",
            "sys_platform": system,
            "platform_system": system_name,
            "platform_machine": machine,
            "platform_release": "",
            "platform_version": "",
        }
        for python, (system, system_name, machine) in product(PYTHONS, PLATFORMS)
    ]


def needed(roots: Iterable[str], place: Place) -> dict[str, str]:
    """Version by canonical name of all that `roots` need in `place`.

    Raises LookupError naming a package that is needed there but not installed here.
    """
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if _WITH_TORCH.match(name) or (wanted.marker and not wanted.marker.evaluate({**place, "extra": ""})):
            continue
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            where = f"Python {place['python_version']} on {place['sys_platform']} {place['platform_machine']}"
            raise LookupError(
                f"{name} is needed by {where} but not installed: pip install {wanted}"
            ) from None
        versions[name] = installed.version.partition("+")[0]
        for extra in ("", *wanted.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            needs = [Requirement(text) for text in installed.requires or ()]
            waiting += [_unmarked(need) for need in needs if _applies(need, place, extra)]
    return versions


def marker(where: list[bool], everywhere: list[Place]) -> str:
    """The marker that is true exactly where `where` says so; empty when that is everywhere."""
    if all(where):
        return ""
    tests: list[tuple[str, Callable[[Place], bool]]] = [
        *((f'python_version < "{p}"', _test("python_version", PYTHONS[:i])) for i, p in enumerate(PYTHONS)),
        *((f'python_version >= "{p}"', _test("python_version", PYTHONS[i:])) for i, p in enumerate(PYTHONS)),
        *((f'sys_platform == "{s}"', _test("sys_platform", [s])) for s in ("linux", "darwin")),
        *((f'platform_machine == "{m}"', _test("platform_machine", [m])) for *_, m in PLATFORMS),
    ]
    for text, test in tests:
        if [test(place) for place in everywhere] == where:
            return f"; {text}"
    names = ("python_version", "sys_platform", "platform_machine")
    cases = [place for place, is_needed in zip(everywhere, where, strict=True) if is_needed]
    return "; " + " or ".join(f"({' and '.join(f'{n} == {c[n]!r}' for n in names)})" for c in cases)


def lock(roots: list[str]) -> dict[str, str]:
    """The line of each package that `roots` need anywhere, by its name."""
    everywhere = places()
    by_place = [needed(roots, place) for place in everywhere]
    versions = {name: version for found in by_place for name, version in found.items()}
    own: dict[str, str] = {
        canonicalize_name(r.name): f"; {r.marker}" for r in map(Requirement, roots) if r.marker
    }
    return {
        name: f"{name}=={version}"
        + (own.get(name) or marker([name in found for found in by_place], everywhere))
        for name, version in sorted(versions.items())
    }


def main() -> int:
    """Write both files; 1 and one line when something is not installed."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    runtime = [*project["dependencies"], *project["optional-dependencies"]["stack"]]
    try:
        base = lock(runtime)
        dev = lock([*runtime, *project["optional-dependencies"]["dev"]])
    except LookupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    more = [line for name, line in dev.items() if base.get(name) != line]
    _write("requirements.lock", list(base.values()))
    _write("requirements-dev.lock", ["-r requirements.lock", *more])
    return 0


def _applies(need: Requirement, place: Place, extra: str) -> bool:
    if need.marker is None:
        return extra == ""
    with_extra = need.marker.evaluate({**place, "extra": extra})
    return with_extra and (extra == "" or not need.marker.evaluate({**place, "extra": ""}))


def _unmarked(need: Requirement) -> Requirement:
    bare = Requirement(str(need))
    bare.marker = None
    return bare


def _test(variable: str, values: Iterable[str]) -> Callable[[Place], bool]:
    allowed = tuple(values)
    return lambda place: place[variable] in allowed


def _write(name: str, lines: list[str]) -> None:
    (REPOSITORY / name).write_text(_HEAD + "\n".join(lines) + "\n")
    print(f"{name}: {len(lines)} lines")


if __name__ == "__main__":
    sys.exit(main())

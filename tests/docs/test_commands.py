"""What the documents tell people to type is understood by the program: commands, options, settings, files, links."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main

from ddpm_pipeline.jobs.cli import app
from ddpm_pipeline.jobs.pack import with_dataset
from ddpm_pipeline.jobs.runner import SECTIONS, JobArguments, settings_of
from tests.docs.lines import DOCUMENTS, REPOSITORY, Shown, fences, inline, shown

ROOT: Any = typer.main.get_command(app)
COMMANDS = [command for document in DOCUMENTS for command in shown(document, "ddpm")]
MAKE = [command for document in DOCUMENTS for command in shown(document, "make")]
PYTHON = [command for document in DOCUMENTS for command in shown(document, "python")]
INLINE = sorted({text for document in DOCUMENTS for text in inline(document, "ddpm")})
_SECTION_OF_COMMAND = {"tune-sampler": "tune", "schedule": "nightly"}


def parsed(words: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """The command that the words call, and its parameters. Raises what the program would tell the user."""
    command, name, rest = ROOT, "", list(words)
    path: list[str] = []
    while getattr(command, "commands", None) is not None:
        own = next(word for word in rest if not word.startswith("-"))
        before = rest[: rest.index(own)]
        assert set(before) <= {"--log-json"}, before
        rest = rest[rest.index(own) + 1 :]
        name, command = own, command.commands[own]
        path.append(own)
    context = command.make_context(name, rest)
    section = "features" if path[0] == "features" else _SECTION_OF_COMMAND.get(name, name)
    return section, context.params


def settings_files(folder: Path) -> None:
    """The YAML files that the documents tell people to write, by the name before each block."""
    for document in DOCUMENTS:
        for name, text in re.findall(
            r"`([\w-]+\.yaml)`:?\n\n```yaml\n(.*?)^```", document.read_text(), re.M | re.S
        ):
            (folder / name).write_text(text)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_ddpm_command_in_the_documents_is_one(
    command: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, params = parsed(command.words)
    if "words" not in params:
        return
    settings_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_ROOT", "s3://ddpm")
    call = JobArguments.of(params["words"] or [], params["config"] or [])
    settings_of(SECTIONS[section], section, with_dataset(call) if section == "pack" else call)


@pytest.mark.parametrize("text", INLINE)
def test_every_ddpm_command_in_a_sentence_names_a_command_and_its_options(text: str) -> None:
    words = [word for word in shlex.split(text)[1:] if word not in ("--log-json", "…")]
    command = ROOT
    while getattr(command, "commands", None) is not None and words and not words[0].startswith("-"):
        assert words[0] in command.commands
        command = command.commands[words.pop(0)]
    options = {option for param in command.params for option in param.opts} | {"--help"}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options


def test_every_make_target_in_the_documents_exists_and_says_what_it_does() -> None:
    told = dict(re.findall(r"^([a-z-]+):.*?## (.+)$", (REPOSITORY / "Makefile").read_text(), re.M))
    asked = {
        word for command in MAKE for word in command.words if "=" not in word and not word.startswith("-")
    }
    asked |= {text.split()[1] for document in DOCUMENTS for text in inline(document, "make")}
    assert len(asked) >= 4
    assert asked <= set(told)


def test_every_module_that_is_to_be_run_exists() -> None:
    modules = {command.words[1] for command in PYTHON if command.words[:1] == ("-m",)}
    modules |= {
        text.split()[2] for document in DOCUMENTS for text in inline(document, "python") if " -m " in text
    }
    assert len(modules) >= 2
    assert [module for module in sorted(modules) if find_spec(module) is None] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_and_heading_that_a_document_points_to_exists(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = (document.parent / name) if name else document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target
    for path in re.findall(r"`((?:pipeline|jobs|infra|tests|docs|benchmarks)/[\w./-]+)`", text):
        assert (REPOSITORY / path.rstrip("/")).exists() or path.endswith("yours"), path


def test_the_settings_files_in_the_documents_are_there_to_be_checked(tmp_path: Path) -> None:
    settings_files(tmp_path)
    assert (tmp_path / "photos.yaml").exists()
    assert sum(len(fences(document, "yaml")) for document in DOCUMENTS) >= 2
    assert len(COMMANDS) > 60


def test_every_command_that_can_be_submitted_is_named() -> None:
    text = (REPOSITORY / "docs" / "how-to.md").read_text()
    sentence = re.search(r"`ddpm submit` takes (.*?), each with", text, re.DOTALL)
    assert sentence is not None
    assert set(re.findall(r"`([a-z-]+)`", sentence[1])) == set(ROOT.commands["submit"].commands)

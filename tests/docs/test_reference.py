"""The settings' page and schema are the models' own, and every settings file in the repository keeps to the schema."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ddpm_pipeline.config.load import setting_names
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.config_docs import configuration_page, schema_text, settings_schema, write_schema
from ddpm_pipeline.jobs.runner import SECTIONS, presets

REPOSITORY = Path(__file__).resolve().parents[2]
VALIDATOR = jsonschema.Draft202012Validator(settings_schema())
OUTDATED = "settings changed: run `make docs`"


def faults(content: Any) -> list[str]:
    return [error.json_path for error in VALIDATOR.iter_errors(content)]


def settings_in_configmaps() -> dict[str, str]:
    (config,) = [
        part
        for part in yaml.safe_load_all((REPOSITORY / "infra/kuberay/base/settings.yaml").read_text())
        if part["metadata"]["name"] == "ddpm-settings"
    ]
    return config["data"]


def test_the_page_and_the_schema_are_current() -> None:
    assert (REPOSITORY / "docs" / "configuration.md").read_text() == configuration_page(), OUTDATED
    assert (REPOSITORY / "docs" / "schema" / "settings.json").read_text() == schema_text(), OUTDATED


def test_the_page_tells_every_setting_and_its_links_lead_somewhere() -> None:
    page = configuration_page()
    for model in SECTIONS.values():
        for name in setting_names(model):
            assert f"| `{name.rsplit('.', 1)[-1]}` |" in page, name
    headings = {line.lstrip("# ").lower() for line in page.splitlines() if line.startswith("### ")}
    assert set(re.findall(r"\]\(#([a-z]+)\)", page)) <= headings
    empty = [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert empty == []


@pytest.mark.parametrize("preset", presets())
def test_every_preset_keeps_to_the_schema(preset: str) -> None:
    assert faults(yaml.safe_load(presets()[preset].read_text())) == []


def test_the_clusters_settings_keep_to_the_schema() -> None:
    files = settings_in_configmaps()
    assert files
    for name, text in files.items():
        assert faults(yaml.safe_load(text)) == [], name


def test_the_schema_refuses_what_the_program_refuses() -> None:
    assert faults({"train": {"steps": 5, "optimizer": {"lr": 2e-4}}}) == []
    assert faults({"train": {"setps": 5}}) == ["$.train"]
    assert faults({"train": {"steps": 0}}) == ["$.train.steps"]
    assert faults({"trian": {}}) == ["$"]
    assert faults({"base": "no-such-preset"}) == ["$.base"]


def test_the_schema_is_written_where_it_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_schema(tmp_path / "new") == 0
    written = json.loads((tmp_path / "new" / "ddpm.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(written)
    assert set(SECTIONS) < set(written["properties"])
    assert "yaml-language-server: $schema=" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"ddpm\.schema\.json: cannot be written"):
        write_schema(tmp_path / "file")

"""Which alias a finished training moves, and whether the gate is asked."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from ddpm_pipeline.config.evaluation import EvaluateConfig, GateConfig
from ddpm_pipeline.tracking import ModelVersion
from ddpm_pipeline.train import training_driver
from tests.train.tiny import tiny

EVALUATE = EvaluateConfig(reference="s3://ddpm/data/digits")
PLAIN = GateConfig(evaluate=EVALUATE)
NAMES_TEACHER = GateConfig.model_validate({"evaluate": EVALUATE, "baseline": {"model": "digits@champion"}})


@pytest.fixture
def alias(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """The champion's alias, in place of MLflow."""
    version = Mock(spec=ModelVersion, version=3, reference="student/3")
    for name, value in {
        "export_model": lambda *_: SimpleNamespace(weights=SimpleNamespace(kind="EMA")),
        "register": lambda *_, **__: version,
        "set_alias": Mock(),
        "describe": Mock(),
        "tell_model_metrics": Mock(),
        "trained_on": Mock(),
        "resolve": lambda _: version,
    }.items():
        monkeypatch.setattr(training_driver, name, value)
    champion = Mock()
    monkeypatch.setattr(training_driver, "LoggedAlias", lambda *_: champion)
    return champion


def published(gate: GateConfig | None, run_gate: Callable[[GateConfig, ModelVersion], str]) -> str | None:
    config = tiny("file:///data", "file:///runs", gate=gate)
    plan: Any = SimpleNamespace(
        config=config,
        index=SimpleNamespace(digest="d", num_samples=8),
        identity="i",
        store=SimpleNamespace(uri="file:///runs/a"),
    )
    checkpoint: Any = SimpleNamespace(record=SimpleNamespace(step=10))
    run: Any = SimpleNamespace(run_id="r")
    return training_driver.publish(plan, run, checkpoint, run_gate)[1]


@pytest.mark.parametrize(
    ("gate", "champion", "is_asked"),
    [
        (None, None, False),
        (PLAIN, None, False),  # there is nothing to compare with
        (NAMES_TEACHER, None, True),
        (None, 2, False),
        (PLAIN, 2, True),
        (NAMES_TEACHER, 2, True),
    ],
)
def test_the_first_version_is_champion_unless_the_gate_names_what_to_compare_it_with(
    alias: Mock, gate: GateConfig | None, champion: int | None, is_asked: bool
) -> None:
    alias.reconcile.return_value = SimpleNamespace(version=champion)
    run_gate = Mock(return_value="gate     refused: worse")
    assert published(gate, run_gate) == (run_gate.return_value if is_asked else None)
    assert run_gate.called is is_asked
    assert alias.move.called is (champion is None and not is_asked)

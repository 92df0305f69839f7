"""Feature networks, metrics and run loggers of another package."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.evaluation import EvaluateConfig, FeatureNetworkConfig, GateConfig
from ddpm_pipeline.config.tracking import MirrorConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.gate import apply_rules
from ddpm_pipeline.evaluate.metrics import compute_metrics
from ddpm_pipeline.features.networks import open_network
from ddpm_pipeline.features.reference_set import load_reference
from ddpm_pipeline.tracking.journal import Journal
from ddpm_pipeline.tracking.mirror import MirroredRun, MirrorFeed
from tests.plugins.conftest import Install

MEANS = FeatureNetworkConfig.model_validate


def packed(folder: Path, count: int) -> str:
    uri = f"file://{folder}/{count}"
    settings = {"count": count}
    pack(PackConfig(source="plugin:blobs", source_settings=settings, dest=uri, channels=1), None)
    return uri


def test_its_features_and_metric_are_measured(install: Install, tmp_path: Path) -> None:
    network = MEANS({"kind": "means", "settings": {"cells": 4}})
    one, other = (load_reference(load_index(packed(tmp_path, n)), network, 16) for n in (16, 40))
    assert one.vectors.shape == (16, 16)
    config = EvaluateConfig.model_validate(
        {"reference": "r", "network": network, "metrics": ["brightness"], "num_splits": 1}
    )
    metric = compute_metrics(other, one, config)["brightness"]
    assert metric.n == 40
    assert metric.value == pytest.approx(float(np.mean(other.vectors) - np.mean(one.vectors)))


def test_the_gate_judges_its_metric_with_a_confidence_interval(install: Install, tmp_path: Path) -> None:
    network = MEANS({"kind": "means", "settings": {"cells": 4}})
    real = load_reference(load_index(packed(tmp_path, 40)), network, 16)
    brighter = replace(real, vectors=real.vectors + np.linspace(0, 20, len(real), dtype=np.float32)[:, None])
    evaluate = {"reference": "r", "network": network, "metrics": ["brightness"]}
    rules = {"brightness": {"better": "lower", "must": "improve"}}
    config = GateConfig.model_validate({"evaluate": evaluate, "rules": rules, "count": 40})
    judgement = apply_rules(real, brighter, real, config)["brightness"]
    assert judgement.champion == pytest.approx(10, rel=1e-3)
    assert judgement.challenger == pytest.approx(0, abs=1e-3)
    low, high = judgement.improvement_interval
    assert 6 < low < 10 < high < 14
    assert judgement.passed


def test_a_rule_for_a_metric_that_nobody_measures_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"rules\.brightness: unknown; known are frechet, .*, and what evaluate.metrics"
    ):
        GateConfig.model_validate(
            {"evaluate": {"reference": "r"}, "rules": {"brightness": {"better": "lower"}}}
        )


def test_another_version_or_setting_is_another_feature_network(install: Install) -> None:
    known = {open_network(MEANS({"kind": "means", "settings": {"cells": n}}), "").identity for n in (1, 2)}
    pinned = MEANS({"kind": "means"})
    install("1.1.0")
    with pytest.raises(
        UserError, match=r"network\.kind: 'means' is of tiny-dit 1\.0\.0, but tiny-dit 1\.1\.0"
    ):
        open_network(pinned, "")
    assert open_network(MEANS({"kind": "means"}), "").identity not in known
    assert len(known) == 2


def test_settings_without_a_plug_in_are_dumped_as_they_always_were() -> None:
    assert set(FeatureNetworkConfig().model_dump()) == {"uri", "sha256", "input", "size", "rgb"}
    assert "metrics" not in EvaluateConfig(reference="r").model_dump()
    with pytest.raises(ValueError, match="uri has no effect for kind 'means'"):
        MEANS({"kind": "means", "uri": "x", "plugin": {"distribution": "d", "version": "1", "object": "m:o"}})


def test_its_run_logger_gets_each_step_once(install: Install, tmp_path: Path) -> None:
    file = tmp_path / "lines"
    for start in (0, 2):
        journal = Journal(tmp_path / f"spool-{start}")
        mirror = MirrorConfig(kind="lines", settings={"file": str(file)})
        feed = MirrorFeed(journal, mirror, MirroredRun("0123456789abcdef", "blobs"))
        for step in range(start, start + 4):
            journal.append({"t": step, "s": step, "m": {"loss": float(step)}})
        assert feed.deliver()
        feed.close()
    assert file.read_text().splitlines() == [f"loss {step} {float(step)}" for step in range(6)]

"""The gate on the real registry, with real trainings on the digits: half the training is refused, twice is promoted."""

import json
from pathlib import Path

import pytest
import yaml

import ddpm_pipeline.jobs.features
import ddpm_pipeline.jobs.promote
import ddpm_pipeline.jobs.train
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.promotion import DECISION_TAG, VERDICT_TAG
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.jobs.runner import JobArguments
from ddpm_pipeline.tracking import resolve, set_alias, versions
from tests.commands import ddpm
from tests.effort import is_long

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]


@pytest.fixture
def preset(stack: LocalStack, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of a model that trains in seconds, on the digits."""
    monkeypatch.chdir(tmp_path)
    pack(PackConfig(source="digits", dest=f"{prefix}/data", channels=1), lambda done, total: None)
    file = tmp_path / "small.yaml"
    net = {
        "base_channels": 16 if is_long() else 8,
        "multipliers": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "norm_groups": 8,
    }
    count = 300 if is_long() else 200
    content = {
        "base": "digits",
        "train": {
            "name": "gated",
            "runs": f"{prefix}/runs",
            "data": {"uri": f"{prefix}/data"},
            "net": net,
            "global_batch": 64 if is_long() else 32,
            "optimizer": {"lr": 2e-3, "warmup_steps": 20},
            "ema": {"decay": 0.98},
            "grid": {"count": 10},
            "workers": {"num_workers": 1},
        },
        "features": {"data": f"{prefix}/data", "steps": 100, "channels": 16, "min_accuracy": 0.9},
        "promote": {"model": "gated", "gate": {"evaluate": {"reference": f"{prefix}/data"}, "count": count}},
    }
    file.write_text(yaml.safe_dump(content))
    return file


def train(preset: Path, steps: int) -> None:
    assert (
        ddpm_pipeline.jobs.train.run_call(
            JobArguments(files=(preset,), overrides=(f"steps={steps}",)), local=True
        )
        == 0
    )


def champion() -> int:
    return resolve("gated@champion").version


@pytest.mark.long
def test_half_the_training_is_refused_and_twice_is_promoted_and_rolled_back(
    preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ddpm_pipeline.jobs.features.run_call(JobArguments(files=(preset,))) == 0
    call = JobArguments(files=(preset,))
    train(preset, 120)
    assert champion() == 1
    assert ddpm_pipeline.jobs.promote.run_call(call) == 0
    assert "nothing to do" in capsys.readouterr().out

    train(preset, 60)
    assert ddpm_pipeline.jobs.promote.run_call(call) == 1
    assert champion() == 1
    refused = next(v for v in versions("gated") if v.version == 2)
    assert refused.tags[VERDICT_TAG] == "refused"
    numbers = json.loads(refused.tags[DECISION_TAG])["judgements"]["frechet"]
    assert numbers["challenger"] > numbers["champion"]
    assert numbers["improvement_interval"][0] < 0

    train(preset, 300)
    assert ddpm_pipeline.jobs.promote.run_call(call) == 0
    assert champion() == 3
    assert "promoted: gated/3" in capsys.readouterr().out
    assert ddpm_pipeline.jobs.promote.rollback("gated") == 0
    assert champion() == 1
    assert ddpm("rollback", "gated") == 0
    assert "nothing to do: gated@champion is gated/1, rolled back from gated/3" in capsys.readouterr().out
    assert champion() == 1
    set_alias("gated", "champion", 2)
    with pytest.raises(UserError, match="replaced no version"):
        ddpm_pipeline.jobs.promote.rollback("gated")
    assert ddpm("rollback", "gated", "--to", "3") == 0
    assert champion() == 3


def test_a_training_ends_with_the_gate(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(preset.read_text())
    content["train"] |= {"name": "judged", "gate": content["promote"]["gate"]}
    preset.write_text(yaml.safe_dump(content))
    train(preset, 20)
    assert "gate" not in capsys.readouterr().out
    train(preset, 40)
    assert "gate     not run: network.uri" in capsys.readouterr().out
    assert ddpm_pipeline.jobs.features.run_call(JobArguments(files=(preset,))) == 0
    train(preset, 120)
    assert "gate     promoted" in capsys.readouterr().out
    assert resolve("judged@champion").version == 3
    assert ddpm("rollback", "judged") == 0
    assert resolve("judged@champion").version == 1

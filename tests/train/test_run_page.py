"""The run page of a real training: charts, grids, data set, models, origin, end; and of one that is fine-tuned."""

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.mirrors import TensorBoardSettings
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.jobs.train import run
from ddpm_pipeline.tracking import download, find_run, resolve, set_alias, tracking_client
from ddpm_pipeline.tracking.mirror import MirroredRun
from ddpm_pipeline.tracking.spool import SPOOL_VARIABLE
from ddpm_pipeline.tracking.tensorboard_mirror import read_events, run_folder
from ddpm_pipeline.train.export import MODEL_METRICS
from ddpm_pipeline.train.training_plan import plan_training
from tests.train.tiny import tiny

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]

CHARTS = {
    "train/loss",
    "train/loss_max",
    *(f"train/loss_t_quartile_{quartile}" for quartile in (1, 2, 3, 4)),
    "train/grad_norm",
    "train/lr",
    "train/skipped_steps",
    "eval/loss",
    "perf/images_per_s",
    "perf/step_seconds",
    "perf/data_wait_share",
    "perf/micro_batch",
}


@pytest.fixture(autouse=True)
def spools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SPOOL_VARIABLE, str(tmp_path / "spools"))


@pytest.fixture(scope="module")
def data(stack: LocalStack) -> str:
    uri = "s3://ddpm/tests/page-digits"
    pack(PackConfig(source="digits", dest=uri, channels=1, shard_size=300), None)
    return uri


def config_of(data: str, prefix: str, **changes: object) -> TrainConfig:
    settings: dict[str, object] = {
        "name": f"page-{time.time_ns()}",
        "steps": 60,
        "checkpoint": {"every_steps": 20, "log_model_every": 2},
        "grid": {"every_steps": 30, "count": 10, "sampler": {"kind": "ddim", "num_steps": 2}},
        "track": {
            "experiment": "pages",
            "send_interval_seconds": 0.2,
            "system_metrics_seconds": 1.0,
            "mirrors": ["tensorboard"],
        },
    }
    return tiny(data, f"{prefix}/runs", **settings | changes)


def trained(config: TrainConfig) -> "MlflowRun":
    assert run(config, lambda done, total, note="": None, local=True) == 0
    found = find_run("pages", f"train/{config.name}-{plan_training(config).identity}-{config.steps}")
    assert found is not None
    return tracking_client().get_run(found.run_id)


def test_the_run_page_shows_what_a_person_looks_for(data: str, prefix: str) -> None:
    config = config_of(data, prefix)
    run = trained(config)
    client, run_id = tracking_client(), run.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.metrics.keys() >= CHARTS
    steps = {point.step for point in client.get_metric_history(run_id, "eval/loss")}
    assert steps == {20, 40, 60}

    grids = [file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".png")]
    assert {int(path.split("step")[1].strip("%+").split("%")[0].split("+")[0]) for path in grids} == {
        0,
        30,
        60,
    }
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.source.count(data) == 1
    assert plan_training(config).index.digest.startswith(dataset.dataset.digest)
    assert [file.path for file in client.list_artifacts(run_id, "config")] == ["config/config.yaml"]
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    assert (run.data.tags["ddpm.device"], run.data.tags["ddpm.deterministic"]) == ("CPU", "true")
    note = run.data.tags["mlflow.note.content"]
    assert "figures/final.png" in note
    assert f"Next: `ddpm generate {config.name} model={config.name}/1`" in note

    version = resolve(f"{config.name}@champion")
    shown = {(model.model_id, model.step) for model in run.outputs.model_outputs}
    named = {client.get_logged_model(model).name: step for model, step in shown}
    assert named == {f"{config.name}-ema-0000040": 40, f"{config.name}-ema-0000060": 60}
    assert (version.model_id, 60) in shown
    assert version.run_id == run_id
    last = next(p for p in client.get_metric_history(run_id, "eval/loss") if p.step == 60)
    assert version.model_id is not None
    told = {m.key: m for m in client.get_logged_model(version.model_id).metrics or []}
    assert told.keys() == set(MODEL_METRICS)
    assert (told["eval/loss"].value, told["eval/loss"].step) == (last.value, 60)
    assert told["eval/loss"].dataset_name == config.name
    events = list(read_events(run_folder(MirroredRun(run_id, config.name), TensorBoardSettings())))
    mirrored = Counter((v.tag, e.step) for e in events for v in e.summary.value if v.tag == "eval/loss")
    assert mirrored == {("eval/loss", step): 1 for step in (20, 40, 60)}


@pytest.mark.long
def test_a_fine_tuned_model_leads_back_to_its_parent(data: str, prefix: str, tmp_path: Path) -> None:
    parent = config_of(data, prefix, steps=8, checkpoint={"every_steps": 8})
    trained(parent)
    version = resolve(f"{parent.name}/1")
    set_alias(parent.name, "base", 1)
    child = config_of(data, prefix, steps=8, checkpoint={"every_steps": 8}, init_from=f"{parent.name}@base")
    run = trained(child)
    assert run.data.tags["ddpm.init_from"] == run.data.tags["ddpm.model"] == f"{parent.name}/1"
    assert run.data.tags["ddpm.init_sha256"] == version.sha256
    assert run.data.tags["ddpm.training_run"] == run.data.tags["mlflow.parentRunId"] == version.run_id
    assert [model.model_id for model in run.inputs.model_inputs] == [version.model_id]
    folder = download(version, tmp_path / "parent")
    same = child.model_copy(update={"init_from": str(folder)})
    assert plan_training(same).identity == plan_training(child).identity != plan_training(parent).identity

    wider = child.net.model_copy(update={"base_channels": 16})
    with pytest.raises(UserError, match=rf"init_from: {parent.name}/1 has net\.base_channels 8, here 16"):
        plan_training(child.model_copy(update={"net": wider}))
    with pytest.raises(UserError, match="no directory of that name, and model 'absent': not in the registry"):
        plan_training(child.model_copy(update={"init_from": "absent@x"}))

"""A package of somebody else brings a network, a sampler, a schedule and images, and the promises hold for them."""

import json
import threading
from pathlib import Path

import pytest
import torch

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.generation import GenerateConfig, GuardConfig
from ddpm_pipeline.config.net import PluginNetConfig
from ddpm_pipeline.config.plugins import OWN, require_plugins
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.driver import generate
from ddpm_pipeline.generate.dry_run import estimate
from ddpm_pipeline.generate.engine import Engine
from ddpm_pipeline.generate.model_source import find_model, resolve_model
from ddpm_pipeline.generate.regenerate import regenerate
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.nets.model_files import build_model, load_card
from ddpm_pipeline.train.checkpoint import latest_checkpoint
from ddpm_pipeline.train.export import export_model
from ddpm_pipeline.train.training_plan import plan_training
from ddpm_pipeline.train.worker import TrainTask, train_local
from tests.generate.inprocess import without_cluster
from tests.generate.tiny import fill
from tests.plugins.conftest import Install


@pytest.fixture
def blobs(install: Install, tmp_path: Path) -> str:
    """The package's images, packed."""
    uri = f"file://{tmp_path}/blobs"
    pack(
        PackConfig(source="plugin:blobs", source_settings={"count": 24}, dest=uri, channels=1, shard_size=12),
        None,
    )
    return uri


@pytest.fixture
def config(blobs: str, tmp_path: Path) -> TrainConfig:
    """A training of the package's network on them."""
    (tmp_path / "runs").mkdir()
    net = {
        "kind": "tiny-dit",
        "image_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "num_classes": 4,
        "null_class": True,
        "dropout": 0.1,
        "settings": {"depth": 1},
    }
    return TrainConfig.model_validate(
        {
            "name": "blobs",
            "runs": f"file://{tmp_path}/runs",
            "data": {"uri": blobs},
            "net": net,
            "schedule": {"kind": "quadratic", "num_steps": 50},
            "label_drop": 0.1,
            "global_batch": 6,
            "steps": 8,
            "log_every_steps": 2,
            "checkpoint": {"every_steps": 4, "eval_samples": 8},
            "grid": {"every_steps": 8, "count": 4, "sampler": {"kind": "second-order", "num_steps": 2}},
        }
    )


def train(config: TrainConfig, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    """The tensors at the end, or where the training stopped."""
    plan = plan_training(config)
    task = TrainTask(config, plan.identity, plan.store.uri, plan.index.digest)
    stop = threading.Event()

    def progress(step: int, total: int, note: str = "") -> None:
        if stop_after is not None and step >= stop_after:
            stop.set()

    train_local(task, progress, stop)
    checkpoint = latest_checkpoint(plan.store)
    assert checkpoint is not None
    return dict(checkpoint.tensors)


def exported(config: TrainConfig, folder: Path) -> Path:
    plan = plan_training(config)
    checkpoint = latest_checkpoint(plan.store)
    assert checkpoint is not None
    export_model(plan, checkpoint, None, folder)
    return folder


def generation(model: Path, output: Path, **more: object) -> GenerateConfig:
    settings: dict[str, object] = {
        "model": str(model),
        "output": f"file://{output}",
        "count": 10,
        "shard_size": 5,
        "batch_size": 4,
        "sampler": SamplerConfig(kind="second-order", num_steps=3, guidance_scale=2.0),
        "guards": GuardConfig(enabled=False),
        "track": None,
    }
    return GenerateConfig.model_validate(settings | more)


def test_its_images_are_packed_with_their_classes(blobs: str, tmp_path: Path) -> None:
    index = load_index(blobs)
    assert (index.num_samples, index.class_names) == (
        24,
        ("top left", "top right", "bottom left", "bottom right"),
    )
    notes = json.loads((tmp_path / "blobs/pack-report.json").read_text())["notes"]
    assert "source: tiny-dit 1.0.0 (tiny_dit.doors:SOURCE)" in notes


def test_its_training_resumes_in_the_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    whole = train(config)
    other = config.model_copy(update={"runs": f"file://{tmp_path}/runs/again"})
    train(other, stop_after=4)
    resumed = train(other)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_its_model_generates_what_verifies_and_is_made_again_bit_by_bit(
    config: TrainConfig, tmp_path: Path
) -> None:
    train(config)
    model = exported(config, tmp_path / "model")
    card = load_card(model)
    assert isinstance(card.net, PluginNetConfig)
    assert str(card.net.plugin) == "tiny-dit 1.0.0"
    assert card.net.settings == {"patch": 2, "width": 32, "depth": 1}
    settings = generation(model, tmp_path / "samples")
    spec = fill(settings)
    assert str(spec.sampler.plugin) == "tiny-dit 1.0.0"
    report = verify(settings.output)
    assert (report.ok, report.complete, report.samples_checked) == (True, True, 10)
    regenerate(report, 10, str(model))
    assert (report.ok, report.regenerated) == (True, 10)
    # three levels, twice for guidance
    assert estimate(settings).evaluations_per_image == 6


def test_a_sample_is_the_same_in_whatever_batch_it_travels(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    found = find_model(str(exported(config, tmp_path / "model")))
    settings = generation(tmp_path / "model", tmp_path / "samples")
    _, spec = resolve_model(settings)
    engine = Engine(spec, build_model(found.card, found.weights, where="test"), found.card)
    together = engine.images(torch.arange(4))
    for i in range(4):
        assert abs(engine.images(torch.tensor([i]))[0].astype(int) - together[i].astype(int)).max() <= 1


def test_another_version_is_refused_by_training_and_generation(
    config: TrainConfig, install: Install, tmp_path: Path
) -> None:
    train(config, stop_after=4)
    model = exported(config, tmp_path / "model")
    fill(generation(model, tmp_path / "samples"))
    install("1.1.0")
    later = TrainConfig.model_validate(
        config.model_dump()
        | {name: _unpinned(getattr(config, name).model_dump()) for name in ("net", "schedule")}
    )
    later = later.model_copy(
        update={"grid": config.grid.model_copy(update={"sampler": SamplerConfig(num_steps=2)})}
    )
    with pytest.raises(
        UserError, match=r"begun with tiny-dit 1\.0\.0.*tiny-dit 1\.1\.0 is installed.*install tiny-dit==1"
    ):
        plan_training(later)
    with pytest.raises(
        UserError, match=r"kind: 'second-order' is of tiny-dit 1\.0\.0, but tiny-dit 1\.1\.0 is installed"
    ):
        plan_training(config)
    found = find_model(str(model))
    with pytest.raises(UserError, match=r"tiny-dit 1\.0\.0, but tiny-dit 1\.1\.0 is installed here"):
        build_model(found.card, found.weights, where="test")
    with without_cluster(), pytest.raises(UserError, match=r"tiny-dit 1\.0\.0, but tiny-dit 1\.1\.0"):
        generate(generation(model, tmp_path / "samples"))


def test_without_the_package_one_line_names_what_to_install(
    config: TrainConfig, install: Install, tmp_path: Path
) -> None:
    train(config, stop_after=4)
    model = exported(config, tmp_path / "model")
    install("")
    card = load_card(model)  # documents can be read without it
    with pytest.raises(
        UserError, match=r"which is not installed here; install it: pip install tiny-dit==1\.0\.0"
    ) as told:
        require_plugins(card)
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="'tiny-dit' is no network that is installed here"):
        TrainConfig.model_validate(config.model_dump() | {"net": {"kind": "tiny-dit"}})
    with pytest.raises(ValueError, match="did you mean 'ddim'"):
        SamplerConfig(kind="dimm")


def test_a_setting_that_the_plug_in_does_not_have_is_refused(install: Install) -> None:
    with pytest.raises(
        ValueError, match=r"settings\.dpth: unknown setting of tiny-dit; known are patch, width, depth"
    ):
        PluginNetConfig.model_validate({"kind": "tiny-dit", "settings": {"dpth": 3}})
    with pytest.raises(ValueError, match="settings has no effect for kind 'ddim'"):
        SamplerConfig.model_validate({"kind": "ddim", "settings": {"a": 1}})


def test_an_object_may_be_named_instead_of_its_entry_point(install: Install) -> None:
    named = PluginNetConfig.model_validate({"kind": "tiny_dit.doors:NETWORK"})
    assert named.plugin == PluginNetConfig.model_validate({"kind": "tiny-dit"}).plugin
    with pytest.raises(ValueError, match="is a ModelMetaclass, not a ddpm_pipeline"):
        PluginNetConfig.model_validate({"kind": "tiny_dit.doors:NetworkSettings"})
    with pytest.raises(ValueError, match="no installed package has the module nowhere"):
        PluginNetConfig.model_validate({"kind": "nowhere.doors:NETWORK"})


def test_a_sampler_that_draws_by_itself_or_calls_the_network_otherwise_is_refused(
    config: TrainConfig, tmp_path: Path
) -> None:
    train(config, stop_after=4)
    model = exported(config, tmp_path / "model")
    for kind, told in (
        ("careless", "use noise"),
        ("miscounted", "says 4 calls of the network, and it made 2"),
    ):
        sampler = SamplerConfig(kind=kind, num_steps=2)
        with pytest.raises(UserError, match=told):
            fill(generation(model, tmp_path / kind, sampler=sampler))


def test_our_own_kinds_are_registered_like_others() -> None:
    import tomllib

    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {group: kinds for group, kinds in OWN.items() if kinds}


def _unpinned(fields: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if name != "plugin"}

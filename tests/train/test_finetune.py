"""Fine-tuning: a training begins with another model's weights, and only with those that fit."""

from pathlib import Path

import pytest
import torch

from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.reading.loader import Loader
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.nets.diffusers_weights import export_diffusers
from ddpm_pipeline.nets.model_files import load_card, load_model
from ddpm_pipeline.train.checkpoint import latest_checkpoint
from ddpm_pipeline.train.export import export_model
from ddpm_pipeline.train.finetune import find_initial, stage_initial, staged_model
from ddpm_pipeline.train.loop import Trainer, chunk_loss
from ddpm_pipeline.train.state import initial_state
from ddpm_pipeline.train.training_plan import plan_training
from tests.train.test_loop import run_alone
from tests.train.tiny import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained for a few steps, as it is exported for the registry."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "runs").mkdir()
    config = tiny(digits, f"file://{folder}/runs")
    run_alone(config)
    plan = plan_training(config)
    checkpoint = latest_checkpoint(plan.store)
    assert checkpoint is not None
    export_model(plan, checkpoint, None, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def foreign(source: Path) -> Path:
    """The same model as a diffusers directory."""
    net, card = load_model(source)
    folder = source.parent / "diffusers"
    export_diffusers(folder, net, card.schedule, card.objective)
    return folder


def first_loss(config: TrainConfig, weights: dict[str, torch.Tensor] | None) -> float:
    state = initial_state(config, CPU, weights)
    trainer = Trainer(config, NoiseSchedule.from_config(config.schedule), state.net, CPU, 1)
    loader = Loader(config.data, load_index(config.data.uri), config.seed, config.global_batch)
    with torch.no_grad():
        terms, _ = chunk_loss(trainer, next(iter(loader.batches(0, 1))))
    return float(terms.per_sample.mean())


def begun(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The weights as a worker finds them, once the driver has staged them."""
    plan = plan_training(config)
    assert plan.initial is not None
    stage_initial(plan.store, plan.initial)
    return staged_model(plan.store, plan.initial.sha256)[1].state_dict()


def test_the_first_loss_is_the_source_models_wherever_it_is_read_from(
    digits: str, runs: str, source: Path, foreign: Path
) -> None:
    net, _ = load_model(source)
    expected = first_loss(tiny(digits, runs), net.state_dict())
    assert expected != first_loss(tiny(digits, runs), None)
    for place in (source, foreign):
        config = tiny(digits, runs, init_from=str(place))
        weights = begun(config)
        assert first_loss(config, weights) == expected
        assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_what_a_training_begins_with_is_part_of_its_identity_and_where_it_was_read_is_not(
    digits: str, runs: str, source: Path, foreign: Path
) -> None:
    scratch, tuned = (
        plan_training(tiny(digits, runs)),
        plan_training(tiny(digits, runs, init_from=str(source))),
    )
    assert scratch.identity != tuned.identity
    assert plan_training(tiny(digits, runs, init_from=str(foreign))).identity == tuned.identity


def test_a_fine_tuned_training_is_resumed_from_its_own_checkpoints_and_its_card_names_the_parent(
    digits: str, runs: str, source: Path, tmp_path: Path
) -> None:
    config = tiny(digits, f"{runs}/a", init_from=str(source))
    undisturbed = run_alone(config)
    again = tiny(digits, f"{runs}/b", init_from=str(source))
    run_alone(again, stop_at=9)
    resumed = run_alone(again)
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())
    from_scratch = run_alone(tiny(digits, f"{runs}/c"))
    assert any(not torch.equal(value, from_scratch[name]) for name, value in undisturbed.items())
    plan = plan_training(config)
    checkpoint = latest_checkpoint(plan.store)
    assert checkpoint is not None
    export_model(plan, checkpoint, None, tmp_path / "tuned")
    training = load_card(tmp_path / "tuned").training
    assert training.init_from == str(source)
    assert training.init_sha256 == load_card(source).weights.sha256


def test_a_model_of_another_kind_is_refused_in_one_line_that_names_every_difference(
    digits: str, runs: str, source: Path
) -> None:
    good = tiny(digits, runs)
    net = good.net.model_dump() | {"base_channels": 16, "norm_eps": 1e-6, "dropout": 0.3}
    for changes, said in [
        ({"net": net}, r"net\.base_channels 8, here 16; net\.norm_eps 1e-05, here 1e-06; use"),
        ({"schedule": {"kind": "linear"}}, r"schedule\.kind 'cosine', here 'linear'; schedule\.num_steps"),
        ({"objective": {"target": "v"}}, r"objective\.target 'eps', here 'v'"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            plan_training(tiny(digits, runs, init_from=str(source), **changes))
        assert str(caught.value).startswith(f"train.init_from: {source} has ")
        assert "\n" not in str(caught.value)
        assert "dropout" not in str(caught.value)


def test_dropout_may_differ_for_it_changes_no_weight(digits: str, runs: str, source: Path) -> None:
    net = tiny(digits, runs).net.model_dump() | {"dropout": 0.0}
    assert find_initial(tiny(digits, runs, net=net, init_from=str(source))) is not None


def test_a_directory_without_a_model_and_damaged_weights_are_named(
    digits: str, runs: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"config\.json: missing"):
        plan_training(tiny(digits, runs, init_from=str(tmp_path)))
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DamageError, match="sha256"):
        plan_training(tiny(digits, runs, init_from=str(tmp_path)))


def test_staged_weights_of_another_model_or_damaged_ones_are_refused(
    digits: str, runs: str, source: Path
) -> None:
    config = tiny(digits, runs, init_from=str(source))
    begun(config)
    store = plan_training(config).store
    with pytest.raises(DamageError, match="is of another model; delete initial/"):
        staged_model(store, "0" * 64)
    store.write("initial/model.safetensors", b"torn")
    with pytest.raises(DamageError, match="sha256"):
        staged_model(store, load_card(source).weights.sha256)

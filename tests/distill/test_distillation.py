"""A few-step student from its settings to a generation: what it is taught with, what is refused, and its resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.distill_job import DistillConfig
from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.index import load_index, read_table
from ddpm_pipeline.data.reading.loader import Loader
from ddpm_pipeline.diffusion import NoiseSchedule, sample, to_uint8
from ddpm_pipeline.distill.plan_distillation import plan_distillation
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.measure import require_unseen_noise
from ddpm_pipeline.generate.spec import make_spec
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.nets.model_files import load_card, load_model
from ddpm_pipeline.store import open_store
from ddpm_pipeline.tracking.run import MAX_PARAMS
from ddpm_pipeline.train.checkpoint import latest_checkpoint
from ddpm_pipeline.train.export import export_model
from ddpm_pipeline.train.training_driver import run_params
from ddpm_pipeline.train.training_plan import plan_training
from tests.generate.tiny import fill, settings
from tests.train.test_loop import run_alone
from tests.train.tiny import tiny

TEACHING = {"kind": "ddim", "num_steps": 4, "guidance_scale": 1.5}
FEW = SamplerConfig(kind="consistency", num_steps=2)


def quietly(done: int, total: int, note: str = "") -> None:
    """No progress."""


def exported(config: TrainConfig, folder: Path) -> Path:
    """The model that a training registers."""
    run_alone(config)
    plan = plan_training(config)
    checkpoint = latest_checkpoint(plan.store)
    assert checkpoint is not None
    export_model(plan, checkpoint, None, folder)
    return folder


@pytest.fixture(scope="module")
def teacher(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "runs").mkdir()
    return exported(tiny(digits, f"file://{folder}/runs"), folder / "model")


def distill(teacher: Path, runs: str, **changes: object) -> DistillConfig:
    plain = tiny("unused", runs)
    shared = {name: getattr(plain, name) for name in ("optimizer", "ema", "global_batch", "log_every_steps")}
    own: dict[str, object] = {
        "name": "tiny-fast",
        "runs": runs,
        "teacher": str(teacher),
        "sampler": TEACHING,
        "steps": 12,
        "checkpoint": {"every_steps": 4, "eval_samples": 8},
        "grid": {"every_steps": 100, "count": 10, "sampler": FEW},
        "loss": {"divisors": [2, 4, 8]},
    }
    return DistillConfig.model_validate(shared | own | changes)


def planned(config: DistillConfig) -> TrainConfig:
    return plan_distillation(config, quietly)


@pytest.fixture(scope="module")
def student(digits: str, teacher: Path) -> Path:
    runs = teacher.parent / "students"
    runs.mkdir()
    config = planned(distill(teacher, f"file://{runs}", data={"uri": digits}))
    return exported(config, teacher.parent / "student")


@pytest.fixture
def pairs(teacher: Path, tmp_path: Path) -> str:
    """A finished generation of the teacher."""
    uri = f"file://{tmp_path}/pairs"
    fill(settings(teacher, uri, count=23, seed=7, first_index=5, sampler=TEACHING))
    return uri


@pytest.mark.parametrize("stops", [[1], [3, 5, 9]])
def test_a_distillation_that_is_stopped_anywhere_ends_in_the_same_weights(
    digits: str, runs: str, teacher: Path, stops: list[int]
) -> None:
    undisturbed = run_alone(planned(distill(teacher, f"{runs}/a", data={"uri": digits})))
    struck = planned(distill(teacher, f"{runs}/b", data={"uri": digits}))
    for stop in stops:
        run_alone(struck, stop_at=stop)
    resumed = run_alone(struck)
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())


def test_the_student_moves_away_from_its_teacher_whose_weights_it_begins_with(
    student: Path, teacher: Path
) -> None:
    (taught, card), (first, _) = load_model(student), load_model(teacher)
    assert card.objective.target == "v"
    assert any(
        not torch.equal(value, first.state_dict()[name]) for name, value in taught.state_dict().items()
    )
    close = [
        float((value - first.state_dict()[name]).abs().max()) for name, value in taught.state_dict().items()
    ]
    assert max(close) < 0.1


def test_the_card_names_teacher_guidance_method_and_steps(student: Path, teacher: Path) -> None:
    card = load_card(student)
    info = card.distillation
    assert info is not None
    assert (info.teacher, info.teacher_sha256) == (str(teacher), load_card(teacher).weights.sha256)
    assert info.sampler == SamplerConfig.model_validate(TEACHING)
    assert (info.method, info.steps, info.pairs) == ("consistency distillation", 12, None)
    assert card.data == load_card(teacher).data


def test_a_trained_models_card_counts_the_images_of_each_class(teacher: Path, digits: str) -> None:
    index = load_index(digits)
    labels = np.concatenate([read_table(index, shard)["label"] for shard in range(len(index.shards))])
    assert load_card(teacher).data.class_counts == tuple(int((labels == label).sum()) for label in range(10))


def test_the_run_page_names_teacher_and_method_within_the_limit_of_its_table(
    digits: str, runs: str, teacher: Path
) -> None:
    params = run_params(plan_training(planned(distill(teacher, runs, data={"uri": digits}))))
    assert params["teacher"] == str(teacher)
    assert params["method"] == "consistency distillation, guidance 1.5 baked in"
    assert len(params) <= MAX_PARAMS
    plain = run_params(plan_training(tiny(digits, runs)))
    assert plain["target"] == "eps"
    assert len(plain) <= MAX_PARAMS


def test_a_student_generates_with_few_steps_only_and_a_teacher_with_many_only(
    student: Path, teacher: Path, tmp_path: Path
) -> None:
    uri = f"file://{tmp_path}/fast"
    fill(settings(student, uri, sampler=FEW, count=23))
    assert verify(uri).ok
    many = SamplerConfig(kind="ddim", num_steps=3)
    for model, sampler, said in [
        (student, many, 'sampler.kind "ddim" does not fit a distilled model; use "consistency"'),
        (teacher, FEW, 'sampler.kind "consistency" needs a distilled model'),
    ]:
        with pytest.raises(UserError, match=said):
            make_spec(settings(model, uri, sampler=sampler), load_card(model))
    with pytest.raises(UserError, match="distilled with classes only"):
        make_spec(settings(student, uri, sampler=FEW, classes=None), load_card(student))
    with pytest.raises(ValueError, match="guidance_scale has no effect for a distilled model"):
        SamplerConfig(kind="consistency", num_steps=2, guidance_scale=2.0)


def test_a_teacher_that_cannot_teach_is_refused_in_one_line(
    digits: str, runs: str, student: Path, teacher: Path, tmp_path: Path
) -> None:
    data = {"uri": digits}
    with pytest.raises(UserError, match=r"distill\.teacher: .* is itself distilled, from "):
        planned(distill(student, runs, data=data))
    with pytest.raises(ValueError, match='"ancestral" draws noise, so one noise has many images'):
        distill(teacher, runs, data=data, sampler={"num_steps": 20})
    for given in ({}, {"data": data, "pairs": "s3://b/p"}):
        with pytest.raises(ValueError, match="data, or pairs, and not both"):
            distill(teacher, runs, **given)
    plain = exported(
        tiny(digits, runs, label_drop=0.0, net=tiny(digits, runs).net.model_dump() | {"null_class": False}),
        tmp_path / "plain",
    )
    with pytest.raises(UserError, match=r"distill\.sampler\.guidance_scale: .* without net\.null_class"):
        planned(distill(plain, runs, data=data))


def test_pairs_are_the_noise_and_the_images_of_the_generation(teacher: Path, runs: str, pairs: str) -> None:
    config = planned(distill(teacher, runs, pairs=pairs))
    assert config.distillation is not None
    info = config.distillation.pairs
    assert info is not None
    assert (info.seed, info.first_index, info.count) == (7, 5, 23)
    index = load_index(config.data.uri)
    loader = Loader(config.data, index, config.seed, 23, with_rows=True)
    batch = next(iter(loader.batches(0, 1)))
    assert batch.rows is not None
    assert sorted(batch.rows.tolist()) == list(range(23))
    net, card = load_model(teacher)
    assert batch.labels is not None
    drawn = sample(
        net,
        NoiseSchedule.from_config(card.schedule),
        config.distillation.sampler,
        batch.rows + info.first_index,
        (1, 8, 8),
        info.seed,
        class_labels=batch.labels,
        objective=card.objective,
    )
    # other batches round otherwise
    assert np.abs(to_uint8(drawn).int().numpy() - batch.images.int().numpy()).max() <= 1
    assert not [info.key for info in open_store(pairs).list() if "index" in info.key]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_student_of_pairs_resumes_to_the_same_weights_and_says_what_taught_it(
    teacher: Path, runs: str, pairs: str, share: float, tmp_path: Path
) -> None:
    config = distill(teacher, f"{runs}/a", pairs=pairs, pair_share=share)
    undisturbed = run_alone(planned(config))
    struck = planned(config.model_copy(update={"runs": f"{runs}/b"}))
    run_alone(struck, stop_at=5)
    resumed = run_alone(struck)
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())
    plan = plan_training(struck)
    checkpoint = latest_checkpoint(plan.store)
    assert checkpoint is not None
    export_model(plan, checkpoint, None, tmp_path / "student")
    card = load_card(tmp_path / "student")
    assert card.distillation is not None
    assert card.distillation.pairs is not None
    assert card.class_names == load_card(teacher).class_names
    judged_with_noise_of(card)


def judged_with_noise_of(card: ModelCard) -> None:
    require_unseen_noise(card, "fast/1", seed=8, first_index=0, count=1000)
    require_unseen_noise(card, "fast/1", seed=7, first_index=28, count=1000)
    with pytest.raises(UserError, match="seed 7: fast/1 was taught with images 5 to 27 of this seed"):
        require_unseen_noise(card, "fast/1", seed=7, first_index=27, count=1)


def test_pairs_that_are_no_pairs_of_this_teacher_are_refused_in_one_line(
    teacher: Path, student: Path, digits: str, runs: str, pairs: str, tmp_path: Path
) -> None:
    gate = {"evaluate": {"reference": digits}, "seed": 7}
    for changes, said in [
        ({"gate": gate}, r"distill\.gate\.seed: 7 is the seed of .* too"),
        (
            {"sampler": TEACHING | {"num_steps": 5}},
            r"distill\.sampler: differs from that of .*'num_steps': 4",
        ),
        ({"pairs": f"file://{tmp_path}/nothing"}, "nothing"),
    ]:
        with pytest.raises(UserError, match=said):
            planned(distill(teacher, runs, **{"pairs": pairs, **changes}))
    others = f"file://{tmp_path}/others"
    fill(settings(student, others, sampler=FEW, count=20))
    with pytest.raises(UserError, match="was generated by another model"):
        planned(distill(teacher, runs, pairs=others))
    eta = f"file://{tmp_path}/eta"
    fill(settings(teacher, eta, sampler={"kind": "ddim", "num_steps": 4, "eta": 1.0}, count=20))
    with pytest.raises(UserError, match='by sampler "ddim", which draws noise in between'):
        planned(distill(teacher, runs, pairs=eta))


@pytest.mark.parametrize("damage", ["manifest", "shard"])
def test_a_generation_that_is_not_sound_and_complete_teaches_nobody(
    teacher: Path, runs: str, pairs: str, damage: str
) -> None:
    store = open_store(pairs)
    if damage == "manifest":
        store.delete("manifest.json")
    else:
        data = bytearray(store.read("shards/000001.tar"))
        data[700] ^= 1
        store.write("shards/000001.tar", bytes(data))
    with pytest.raises(UserError, match=r"is not sound and complete \(.*ddpm verify"):
        planned(distill(teacher, runs, pairs=pairs))


def test_the_identity_holds_the_method_and_the_teacher_and_not_the_place_of_either(
    digits: str, runs: str, teacher: Path, student: Path, tmp_path: Path
) -> None:
    def identity(config: DistillConfig) -> str:
        return plan_training(planned(config)).identity

    data = {"uri": digits}
    first = identity(distill(teacher, runs, data=data))
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("model.json", "model.safetensors"):
        (copy / name).write_bytes((teacher / name).read_bytes())
    assert identity(distill(copy, runs, data=data)) == first
    changes: list[dict[str, object]] = [
        {"loss": {"divisors": [2, 4]}},
        {"sampler": TEACHING | {"guidance_scale": 1.25}},
        {"steps": 16},
    ]
    for change in changes:
        assert identity(distill(teacher, runs, data=data, **change)) != first
    assert "distillation" not in json.dumps(tiny(digits, runs).identity("0" * 64))

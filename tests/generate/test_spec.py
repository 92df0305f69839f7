"""A spec names a generation; whatever else is asked for at its prefix is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.model_card import TrainingData
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.generate.layout import SPEC_KEY
from ddpm_pipeline.generate.model_source import find_model, resolve_model
from ddpm_pipeline.generate.prefix_spec import check_prefix, raise_count
from ddpm_pipeline.generate.shard_writer import comparable_training_data
from ddpm_pipeline.generate.spec import make_spec, pretty, read_spec, resolve_classes, write_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.nets.model_files import load_card, load_model
from ddpm_pipeline.store import ObjectInfo, Store, open_store
from tests.generate.tiny import plan_of, settings, tiny_card, tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/out")


def config(model: Path, **more: object) -> GenerateConfig:
    return settings(model, f"file://{model.parent}/out", **more)


CHANGES: dict[str, object] = {
    "seed": 1,
    "first_index": 5,
    "shard_size": 20,
    "batch_size": 5,
    "dtype": "bfloat16",
    "image_format": "npy",
    "cpu_threads": 2,
    "compile": True,
    "classes": [1],
    "sampler": {"kind": "ddim", "num_steps": 4},
}


@pytest.mark.parametrize("field", CHANGES)
def test_each_setting_that_determines_bits_changes_the_digest_and_is_named(
    field: str, model: Path, store: Store
) -> None:
    before, _ = plan_of(config(model))
    after, _ = plan_of(config(model, **{field: CHANGES[field]}))
    assert before.digest != after.digest
    write_spec(store, before)
    with pytest.raises(UserError, match=f"another generation .*{field}") as refusal:
        check_prefix(Generation(store, after))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_workers": 7},
        {"max_workers": 9},
        {"cpus_per_worker": 2},
        {"max_attempts": 1},
        {"name": "x"},
        {"drain_seconds": 1},
    ],
)
def test_settings_of_the_work_leave_the_digest_alone(change: dict[str, object], model: Path) -> None:
    assert plan_of(config(model))[0] == plan_of(config(model, **change))[0]


def test_another_network_is_another_generation(model: Path, tmp_path: Path, store: Store) -> None:
    before, _ = plan_of(config(model))
    after, _ = plan_of(config(tiny_model(tmp_path / "other", seed=1)))
    write_spec(store, before)
    with pytest.raises(UserError, match=r"model\.sha256"):
        check_prefix(Generation(store, after))


def test_the_count_may_be_raised_but_not_lowered(model: Path, store: Store) -> None:
    small, large = plan_of(config(model, count=10))[0], plan_of(config(model, count=20))[0]
    assert small.digest == large.digest
    assert check_prefix(Generation(store, small)) is None
    write_spec(store, small)
    assert check_prefix(Generation(store, large)) == Generation(store, small)
    write_spec(store, large)
    with pytest.raises(
        UserError, match="count is 20 at this prefix and can only be raised, not lowered to 10"
    ):
        check_prefix(Generation(store, small))


def test_a_prefix_with_foreign_objects_is_refused(model: Path, store: Store) -> None:
    store.write("shards/000000.tar", b"mine")
    with pytest.raises(UserError, match=r"holds shards/000000\.tar but no spec\.json"):
        check_prefix(Generation(store, plan_of(config(model))[0]))


def test_a_prefix_that_another_job_claims_during_the_look_is_joined(
    model: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = plan_of(config(model))
    plain_list = store.list

    def claimed_meanwhile(prefix: str = "") -> Iterator[ObjectInfo]:
        write_spec(store, spec)
        return plain_list()

    monkeypatch.setattr(store, "list", claimed_meanwhile)
    assert check_prefix(Generation(store, spec)) == Generation(store, spec)


def test_a_spec_reads_back_equal_and_a_torn_one_is_damage(model: Path, store: Store) -> None:
    spec, _ = plan_of(config(model, classes={"one": 1, "two": 2.5}))
    data = pretty(spec.model_dump(mode="json"))
    store.write(SPEC_KEY, data)
    read = read_spec(store)
    assert read == spec
    assert read is not None
    assert read.digest == spec.digest
    store.write(SPEC_KEY, data[:-20])
    with pytest.raises(DamageError, match=r"spec\.json: not a spec"):
        read_spec(store)


def test_classes_are_found_by_name_and_by_label(model: Path) -> None:
    card = load_card(model)
    plan = resolve_classes(["two", 0], card)
    assert plan is not None
    assert plan.labels == (2, 0)
    drawn = resolve_classes({"two": 1, 0: 3}, card)
    assert drawn is not None
    assert (drawn.labels, drawn.weights) == ((0, 2), (3.0, 1.0))
    auto = resolve_classes("auto", card)
    assert auto == resolve_classes("balanced", card)
    assert resolve_classes("auto", tiny_card(classes=False)) is None


def test_classes_as_in_the_data_are_weighted_by_their_numbers_of_training_images(model: Path) -> None:
    card = tiny_card(data=TrainingData(class_counts=(3, 0, 9)))
    drawn = resolve_classes("data", card)
    assert drawn == resolve_classes({0: 3, 2: 9}, card)
    with pytest.raises(UserError, match="does not count the training images of each class"):
        resolve_classes("data", load_card(model))


def test_guards_compare_with_the_training_data_where_classes_are_as_in_it_or_even(model: Path) -> None:
    data = TrainingData(class_counts=(3, 0, 9))
    for classes, is_comparable in (
        ({0: 3, 2: 9}, True),
        ("auto", True),
        ({0: 1, 2: 9}, False),
        ([0, 2], False),
    ):
        spec, _ = plan_of(config(model, classes=classes))
        assert (comparable_training_data(spec, data) is data) == is_comparable


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["three"], "'three' is unknown; labels are 0..2, names: nought, one, two"),
        ([3], "3 is unknown"),
        ([], "empty"),
        ({"one": 1, 1: 2}, "named twice"),
        ({"one": 0}, "not all zero"),
        ({"one": -1, "two": 2}, "not negative"),
    ],
)
def test_wrong_classes_are_refused_by_name(choice: object, message: str, model: Path) -> None:
    with pytest.raises(UserError, match=message):
        resolve_classes(choice, load_card(model))  # pyright: ignore[reportArgumentType]


def test_classes_are_refused_for_a_network_without_any(tmp_path: Path) -> None:
    plain = tiny_model(tmp_path / "plain", tiny_card(classes=False))
    with pytest.raises(UserError, match="the network has no classes"):
        plan_of(config(plain, classes=[0]))
    with pytest.raises(UserError, match="guidance_scale"):
        plan_of(config(plain, sampler=SamplerConfig(kind="ddim", num_steps=3, guidance_scale=2.0)))


def test_the_kind_of_weights_can_be_demanded(model: Path) -> None:
    assert plan_of(config(model, weights="ema"))[0].model.weights == "ema"
    with pytest.raises(UserError, match="holds 'ema' weights, not 'raw'"):
        plan_of(config(model, weights="raw"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 11}, "batch_size is larger than shard_size"),
        ({"max_workers": 1, "num_workers": 2}, "max_workers is less than num_workers"),
        ({"gpus_per_worker": 1.5}, "others would idle; write 1 and raise num_workers"),
        ({"gpus_per_worker": 2}, "others would idle; write 1 and raise num_workers"),
        ({"first_index": 10**12}, "twelve digits"),
        ({"count": 0}, "greater than or equal to 1"),
        ({"seed": -1}, "greater than or equal to 0"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object], message: str, model: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        config(model, **change)


@pytest.mark.parametrize("reference", ["nowhere", "./nowhere", "/no/where"])
def test_a_model_that_is_not_there_is_refused_in_one_line(reference: str) -> None:
    with pytest.raises(UserError, match=f"model: {reference} is not a folder"):
        find_model(reference)


def test_changed_weights_are_refused(model: Path) -> None:
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamageError, match=r"model\.safetensors: its sha256 is"):
        find_model(str(model))
    with pytest.raises(DamageError, match="sha256"):
        load_model(model)


def test_a_card_of_another_network_is_refused(model: Path) -> None:
    card = load_card(model)
    path = model / "model.json"
    wider = card.model_copy(update={"net": card.net.model_copy(update={"base_channels": 16})})
    path.write_text(wider.model_dump_json())
    with pytest.raises(DamageError, match="do not fit the network"):
        load_model(model)
    path.write_text("{")
    with pytest.raises(UserError, match=r"model\.json"):
        load_model(model)


def test_saving_twice_gives_equal_bytes(model: Path, tmp_path: Path) -> None:
    again = tiny_model(tmp_path / "again")
    for name in ("model.safetensors", "model.json"):
        assert (model / name).read_bytes() == (again / name).read_bytes()


def test_a_spec_names_the_network_it_was_made_with(model: Path) -> None:
    found = find_model(str(model))
    spec = make_spec(config(model), found.card, name="digits", version=3, device="cuda")
    assert (spec.model.name, spec.model.version, spec.model.sha256) == (
        "digits",
        3,
        found.card.weights.sha256,
    )
    assert spec.cpu_threads is None


def test_the_card_is_part_of_what_a_generation_is_compared_by(model: Path, store: Store) -> None:
    """Class names and statistics are in no weights: who changes them is told before anything is sampled."""
    _, spec = resolve_model(config(model))
    write_spec(store, spec)
    assert check_prefix(Generation(store, resolve_model(config(model))[1])) == Generation(store, spec)
    card = json.loads((model / "model.json").read_bytes())
    (model / "model.json").write_text(json.dumps(card | {"class_names": ["two", "one", "nought"]}))
    _, changed = resolve_model(config(model))
    assert changed.digest == spec.digest
    with pytest.raises(UserError, match=rf'model.card: "{spec.model.card}" stored'):
        check_prefix(Generation(store, changed))


def test_a_spec_from_before_cards_were_recorded_keeps_its_digest_and_is_pinned_when_extended(
    model: Path, store: Store
) -> None:
    _, spec = resolve_model(config(model))
    document = spec.model_dump(mode="json")
    del document["model"]["card"]
    store.write(SPEC_KEY, pretty(document))
    old = read_spec(store)
    assert old is not None
    assert old.model.card is None
    assert old.digest == spec.digest
    assert check_prefix(Generation(store, spec)) == Generation(store, old)
    raise_count(Generation(store, spec).with_count(spec.count + 1))
    extended = read_spec(store)
    assert extended is not None
    assert extended.model.card == spec.model.card

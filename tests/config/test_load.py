"""Settings come together from presets, files and words; what is wrong is named in one line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.diffusion import check_together
from ddpm_pipeline.config.distill_job import DistillConfig
from ddpm_pipeline.config.generation import GenerateConfig, SampleConfig
from ddpm_pipeline.config.load import _kinds, _override, described_settings, load_settings, setting_names
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.config.training import TrainConfig, WorkerConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.runner import SECTIONS, JobArguments, preset_file, presets, settings_of
from ddpm_pipeline.nets import UNet, parameter_count


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_ROOT", "s3://here")


def digits(*overrides: str) -> TrainConfig:
    return load_settings(TrainConfig, "train", [preset_file("digits")], overrides, sections=tuple(SECTIONS))


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        digits(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_resolves_to_valid_settings_that_fit_together(name: str) -> None:
    call = JobArguments(preset=name)
    train = settings_of(TrainConfig, "train", call)
    generate = settings_of(GenerateConfig, "generate", call)
    assert settings_of(PackConfig, "pack", call).dest == train.data.uri
    check_together(train.schedule, train.objective, train.grid.sampler, train.net)
    if not name.endswith("-fast"):
        assert generate.model == f"{train.name}@champion"
        check_together(train.schedule, train.objective, generate.sampler, train.net)
        return
    distill = settings_of(DistillConfig, "distill", call)
    assert distill.teacher == f"{train.name}@champion"
    assert generate.model == f"{distill.name}@champion"
    assert distill.data == train.data
    teacher = settings_of(GenerateConfig, "generate", JobArguments(preset=train.name))
    assert distill.sampler == teacher.sampler
    check_together(train.schedule, train.objective, distill.sampler, train.net)
    for sampler in (distill.grid.sampler, generate.sampler):
        check_together(train.schedule, train.objective, sampler, train.net, distilled=True)


def test_the_papers_networks_have_the_papers_sizes() -> None:
    for name, config, count in [
        ("ddpm-cifar10", UNetConfig.ddpm_cifar10(), 35_746_307),
        ("ddpm-256", UNetConfig.ddpm_256(), 113_673_219),
    ]:
        train = settings_of(TrainConfig, "train", JobArguments(preset=name))
        assert train.net == config
        with torch.device("meta"):
            assert parameter_count(UNet(train.net)) == count


def test_overrides_win_over_files_and_files_over_presets(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: digits\ntrain:\n  steps: 7000\n  seed: 5\n")
    config = load_settings(
        TrainConfig, "train", [file], ["seed=6"], sections=tuple(SECTIONS), presets=presets()
    )
    assert (config.steps, config.seed, config.net.image_size) == (7000, 6, 8)


def test_root_stands_for_the_installation_in_files_words_and_defaults_alike() -> None:
    config = digits("track.experiment={root}")
    assert (config.data.uri, config.track.experiment, config.runs) == (
        "s3://here/data/digits",
        "s3://here",
        "s3://here/runs",
    )


def test_a_missing_root_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDPM_ROOT")
    assert "ddpm up" in refusal()


def test_a_mistyped_setting_is_answered_with_the_nearest_name() -> None:
    assert "train.optimizer.lrr: unknown setting; did you mean 'optimizer.lr'?" in refusal("optimizer.lrr=1")
    assert "did you mean 'steps'?" in refusal("stesp=1")


def test_an_ill_typed_setting_is_named_with_what_was_given() -> None:
    assert refusal("steps=many").startswith("train.steps: input should be a valid integer")
    assert "'many'" in refusal("steps=many")
    assert "train.steps" in refusal("steps=1.5")


def test_a_word_that_is_no_setting_is_refused() -> None:
    assert "key=value" in refusal("=3")


def test_settings_that_contradict_each_other_are_refused() -> None:
    assert "global_batch 1 is less than workers.num_workers 2" in refusal("global_batch=1")
    assert "multiple of log_every_steps" in refusal("checkpoint.every_steps=75")
    assert "label_drop" in refusal("label_drop=0")
    assert "needs weights that differ" in refusal("objective.weighting=uniform", "timesteps.importance=true")
    learned = ("objective.weighting=min-snr", "objective.variance=learned", "net.out_channels=2")
    assert "a learned variance needs all" in refusal(*learned, "timesteps.importance=true")


def test_the_number_of_workers_is_one_number_or_the_fewest_and_the_most() -> None:
    for word, fewest, most in [("3", 3, 3), ("[1, 3]", 1, 3), ("[2,2]", 2, 2)]:
        workers = digits(f"workers.num_workers={word}").workers
        assert (workers.fewest, workers.most) == (fewest, most)
        assert WorkerConfig.model_validate(workers.model_dump(mode="json")) == workers
    for word in ("0", "[0, 2]", "2.5", "many", "[1, 2, 3]", "[]", "true", "{a: 1}"):
        assert "is neither a number from 1 nor two of them, [fewest, most]" in refusal(
            f"workers.num_workers={word}"
        )
    assert "the fewest come first; write [1, 3]" in refusal("workers.num_workers=[3, 1]")
    assert "less than workers.num_workers 900" in refusal("workers.num_workers=[1, 900]")


def test_a_file_that_is_absent_or_no_mapping_or_has_an_unknown_section_is_named(tmp_path: Path) -> None:
    for content, said in [
        (None, "cannot be read"),
        ("- 1", "a mapping"),
        ("trian: {}", "did you mean 'train'"),
    ]:
        file = tmp_path / "f.yaml"
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
        with pytest.raises(UserError, match=said) as caught:
            load_settings(TrainConfig, "train", [file])
        assert str(file) in str(caught.value)


def test_one_setting_of_tracking_leaves_the_run_with_the_other_trainings() -> None:
    assert (
        digits("track.system_metrics_seconds=5").track.experiment == digits().track.experiment == "training"
    )
    assert digits("track.experiment=mine").track.experiment == "mine"
    asked = GenerateConfig.model_validate(
        {"model": "m@champion", "output": "file:///x", "count": 1, "track": {"color": "#112233"}}
    )
    assert asked.track is not None
    assert asked.track.experiment == "generation"


def test_numbers_written_as_people_write_them_are_numbers() -> None:
    assert digits("optimizer.lr=1e-4").optimizer.lr == 1e-4


AS_IT_STANDS = (
    "photos #2",
    "2024-05-01",
    "007",
    "yes",
    "[x]",
    "{a: 1}",
    "1e3",
    "*a",
    "&a b",
    "!x",
    "a: b",
    "~",
    "'q'",
    "",
)


def text_settings() -> Iterator[tuple[str, str]]:
    """Every setting of every job that is nothing but text, with its section."""
    for section, model in SECTIONS.items():
        for name in setting_names(model):
            kinds = {kind for kind in _kinds(model, name.split(".")) if kind is not type(None)}
            if kinds == {str}:
                yield section, name


def test_there_are_text_settings_in_every_section() -> None:
    assert {"pack", "train", "generate"} <= {section for section, _ in text_settings()}
    assert ("pack", "source") in set(text_settings())


@pytest.mark.parametrize(("section", "name"), list(text_settings()))
def test_a_text_setting_takes_the_text_as_it_stands(section: str, name: str) -> None:
    for text in AS_IT_STANDS:
        value: Any = _override(f"{name}={text}", SECTIONS[section])
        for part in name.split("."):
            value = value[part]
        assert value == text


def test_null_takes_back_a_text_that_may_be_missing_and_is_text_elsewhere() -> None:
    assert digits("data.cache_dir=/x", "data.cache_dir=null").data.cache_dir is None
    words = ("source=null", "dest=file:///x#1")
    config = load_settings(PackConfig, "pack", [], words)
    assert (config.source, config.dest) == ("null", "file:///x#1")


def test_a_date_in_a_file_is_text(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("pack:\n  source: 2024-05-01\n  dest: d\n")
    assert load_settings(PackConfig, "pack", [file]).source == "2024-05-01"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
            "more than",
        ),
        (
            "pack:\n  m0: &m0 {a: x}\n"
            + "".join(f"  m{i}: &m{i} {{a: *m{i - 1}, b: *m{i - 1}}}\n" for i in range(1, 60)),
            "nested|more than",
        ),
        ("pack: &p\n  source: *p\n", "part of"),
        ("pack: " + "[" * 100 + "]" * 100, "nested deeper"),
        ("pack: {source: a, source: b}", "'source' occurs twice"),
        ("pack: {1: a}", "a key is no word"),
        ("pack: {[a]: b}", "a key is no word"),
        ("pack: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("pack: {source: '" + "x" * 1_000_001 + "'}", "characters"),
    ],
    ids=["aliases", "mappings", "itself", "deep", "twice", "number", "list", "tag", "long"],
)
def test_yaml_that_no_person_writes_is_refused_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"f\.yaml: not valid YAML .*({said})"):
        load_settings(PackConfig, "pack", [file])


def test_identity_names_what_determines_the_weights_and_nothing_else() -> None:
    same = digits().digest("d")
    for word in (
        "workers.num_workers=1",
        "checkpoint.every_steps=1000",
        "name=x",
        "track.experiment=e",
        "runs=r",
        "data.num_workers=2",
    ):
        assert digits(word).digest("d") == same, word
    for word in ("seed=1", "optimizer.lr=0.1", "data.window_shards=2", "net.base_channels=64", "steps=4000"):
        assert digits(word).digest("d") != same, word
    assert digits().digest("other data") != same


@pytest.mark.parametrize(
    ("words", "processes"),
    [
        ((), 0),
        (("workers.cpus_per_worker=8",), 0),
        (("workers.gpus_per_worker=1",), 0),
        (("workers.gpus_per_worker=1", "workers.cpus_per_worker=3"), 2),
        (("workers.gpus_per_worker=1", "workers.cpus_per_worker=32"), 4),
        (("workers.gpus_per_worker=1", "workers.cpus_per_worker=32", "data.num_workers=9"), 9),
        (("data.num_workers=3",), 3),
    ],
)
def test_where_a_gpu_trains_other_cores_decode(words: tuple[str, ...], processes: int) -> None:
    config = digits("workers.num_workers=1", *words)
    assert config.reading().num_loader_processes == processes
    assert config.reading().uri == config.data.uri


def test_more_steps_continue_a_training_whose_learning_rate_does_not_depend_on_them() -> None:
    constant = "optimizer.decay=none"
    assert digits(constant, "steps=9000").digest("d") == digits(constant).digest("d")


@pytest.mark.parametrize("model", [PackConfig, TrainConfig, GenerateConfig, SampleConfig])
def test_every_setting_is_documented(model: type[Settings]) -> None:
    assert [name for name, description in described_settings(model) if not description.strip()] == []

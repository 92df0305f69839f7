"""The gate on quality and cost: exact evaluations, measured speed, and a baseline with a sampler of its own."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from pydantic import ValidationError

import ddpm_pipeline.jobs.promote
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.evaluation import GateConfig, PromoteConfig
from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate import promotion
from ddpm_pipeline.evaluate.gate import Decision, SampledModel, judge, table, verdict
from ddpm_pipeline.evaluate.promotion import DECISION_TAG, VERDICT_TAG, decide
from ddpm_pipeline.evaluate.sampling_cost import BatchTimes, evaluations_of, sampling_cost
from ddpm_pipeline.generate.model_source import ResolvedModel, find_model
from ddpm_pipeline.parallel import HERE, MapWorkers
from ddpm_pipeline.progress import no_progress
from ddpm_pipeline.tracking import ModelVersion
from tests.evaluate.made import config, measured
from tests.evaluate.test_promote import Models, connect
from tests.generate.tiny import tiny_card, tiny_model

REAL = measured(400, seed=50)
FASTER = {"images_per_device_second": {"better": "higher", "must": "improve"}}
CHEAPER = {"evaluations_per_image": {"better": "lower", "must": "improve"}}
KEEPS = {"frechet": {"better": "lower", "must": "keep", "tolerance": 1.0}}
FEW, MANY = SamplerConfig(kind="ddim", num_steps=2), SamplerConfig(kind="ddim", num_steps=6)


def gate(**changes: object) -> GateConfig:
    known = {"evaluate": config(), "count": 200, "batch_size": 20, "resamples": 40}
    return GateConfig.model_validate(known | changes)


def batches(*seconds: float) -> BatchTimes:
    return BatchTimes([20] * len(seconds), list(seconds))


def model(evaluations: int = 20, seconds: float = 1.0, noise: float = 0.0, seed: int = 1) -> SampledModel:
    spread = np.random.default_rng(seed).uniform(-noise, noise, 8)
    return SampledModel(measured(seed=seed), evaluations, batches(*(seconds * (1 + spread))))


def test_fewer_evaluations_are_an_improvement_without_an_interval() -> None:
    judgements = judge(model(4), model(20), REAL, gate(rules=CHEAPER))
    one = judgements["evaluations_per_image"]
    assert (one.challenger, one.champion, one.improvement) == (4, 20, 16)
    assert (one.challenger_interval, one.champion_interval, one.improvement_interval) == (
        (4, 4),
        (20, 20),
        (16, 16),
    )
    assert verdict(judgements) == (True, "better in evaluations_per_image; worse in nothing")


@pytest.mark.parametrize(("evaluations", "must", "passes"), [(20, "improve", False), (20, "keep", True)])
def test_as_many_evaluations_are_kept_but_no_improvement(evaluations: int, must: str, passes: bool) -> None:
    rules = {"evaluations_per_image": {"better": "lower", "must": must}}
    assert verdict(judge(model(evaluations), model(20), REAL, gate(rules=rules)))[0] is passes


def test_quality_within_its_tolerance_at_a_lower_cost_passes_and_a_loss_beyond_it_does_not() -> None:
    rules = CHEAPER | KEEPS
    teacher, student = model(20, seed=1), model(4, seed=2)
    judgements = judge(student, teacher, REAL, gate(rules=rules))
    assert list(judgements) == ["evaluations_per_image", "frechet"]
    assert verdict(judgements)[0]
    blurred = SampledModel(measured(seed=2, shift=0.8), 4, student.times)
    passes, reason = verdict(judge(blurred, teacher, REAL, gate(rules=rules)))
    assert not passes
    assert reason.startswith("frechet improves by -")


def test_a_speed_that_noise_could_explain_is_no_improvement() -> None:
    clear = judge(
        model(seconds=0.5, noise=0.1), model(seconds=1.0, noise=0.1, seed=2), REAL, gate(rules=FASTER)
    )
    one = clear["images_per_device_second"]
    assert one.passed
    assert one.improvement_interval[0] < one.improvement < one.improvement_interval[1]
    assert one.challenger == pytest.approx(40, rel=0.1)
    doubtful = judge(model(noise=0.5), model(noise=0.5, seed=2), REAL, gate(rules=FASTER))
    assert not doubtful["images_per_device_second"].passed


def test_the_first_batches_and_one_that_is_not_full_are_not_timed() -> None:
    times = BatchTimes()
    for images, seconds in ((20, 9.0), (20, 5.0), (20, 1.0), (20, 3.0), (7, 1.0)):
        times.add(images, seconds)
    steady = times.steady(20)
    assert (steady.images, steady.seconds) == ([20, 20], [1.0, 3.0])
    assert steady.images_per_second()(np.ones(2)) == 10
    assert steady.images_per_second()(np.array([2.0, 0.0])) == 20


def test_without_timed_batches_the_speed_is_not_stated() -> None:
    cost = sampling_cost(FEW, 2, BatchTimes(), gate())
    assert (cost.evaluations_per_image, cost.images_per_device_second) == (2, None)


def test_evaluations_are_those_of_the_models_schedule() -> None:
    guided = SamplerConfig(kind="heun", num_steps=5, guidance_scale=2.0, guidance_interval=(0.0, 1e9))
    assert evaluations_of(tiny_card(), guided) == 18
    assert evaluations_of(tiny_card(), MANY) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rules": {"evaluations_per_image": {"better": "higher"}}},
            "rules.evaluations_per_image: lower is better",
        ),
        ({"rules": {"images_per_device_second": {"better": "lower"}}}, "higher is better"),
        ({"rules": FASTER, "count": 99}, r"5 full batches.*raise count to 100, or lower batch_size"),
        ({"baseline": {}}, "names neither model nor sampler"),
    ],
)
def test_rules_and_baselines_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        gate(**changes)


def test_a_decision_of_an_earlier_version_is_read_and_has_no_cost() -> None:
    known: dict[str, object] = {
        "verdict": "promoted",
        "reason": "there was no champion",
        "challenger": "digits/1",
        "champion": None,
        "count": 1,
        "reference_digest": "",
        "reference_count": 1,
        "network": "",
        "settings": {"evaluate": {"reference": "r"}},
        "judgements": {},
        "decided_at": 0.0,
    }
    decision = Decision.model_validate(known)
    assert decision.challenger_cost is None
    assert not {"baseline", "challenger_cost", "champion_cost"} & decision.model_dump(mode="json").keys()


@pytest.fixture
def registered(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, ModelVersion]]:
    """Puts models with these cards into a registry that trusts everything; returns their versions."""

    def put(**cards: ModelCard) -> dict[str, ModelVersion]:
        folders = {
            f"{name}/1": tiny_model(tmp_path / name, card, seed)
            for seed, (name, card) in enumerate(cards.items())
        }
        versions = {name: ModelVersion(name, 1, "", "", "", {}) for name in cards}

        def find(reference: str) -> ResolvedModel:
            return find_model(str(folders[reference]))

        monkeypatch.setattr(promotion, "find_model", find)

        def resolve(reference: str) -> ModelVersion:
            return versions[reference.partition("@")[0]]

        monkeypatch.setattr(promotion, "resolve", resolve)
        for check in ("require_trusted_network", "require_trusted_reference"):
            monkeypatch.setattr(promotion, check, Mock())
        return versions

    return put


def on_digits(digits: str, **changes: object) -> GateConfig:
    known: dict[str, object] = {
        "evaluate": {"reference": digits},
        "count": 30,
        "batch_size": 6,
        "resamples": 20,
        "sampler": FEW,
        "rules": CHEAPER,
    }
    return GateConfig.model_validate(known | changes)


def test_a_student_is_judged_beside_its_teacher_each_with_its_sampler(
    digits: str, registered: Callable[..., dict[str, ModelVersion]], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, int, SamplerConfig]] = []
    measure = promotion.model_features

    def watched(model: ResolvedModel, settings: object, *rest: object) -> object:
        drawn.append((settings.model, settings.seed, settings.sampler))  # type: ignore[attr-defined]
        return measure(model, settings, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(promotion, "model_features", watched)
    models = registered(student=tiny_card(size=8), teacher=tiny_card(size=8))
    config = on_digits(
        digits,
        rules=CHEAPER | {"frechet": {"better": "lower", "tolerance": 1e9}},
        baseline={"model": "teacher@champion", "sampler": MANY},
    )
    decision = decide(config, models["student"], None, no_progress, HERE)
    assert drawn == [("student/1", 0, FEW), ("teacher/1", 0, MANY)]
    assert (decision.verdict, decision.champion, decision.baseline) == ("promoted", None, "teacher/1")
    assert decision.challenger_cost is not None
    assert decision.champion_cost is not None
    assert (decision.challenger_cost.sampler, decision.champion_cost.sampler) == (FEW, MANY)
    assert (decision.challenger_cost.evaluations_per_image, decision.champion_cost.evaluations_per_image) == (
        2,
        6,
    )
    assert decision.challenger_cost.images_per_device_second is not None
    assert decision.judgements.keys() == {"evaluations_per_image", "frechet"}
    assert Decision.model_validate(json.loads(decision.model_dump_json())) == decision
    lines = table(decision)
    assert lines[0].split() == ["metric", "student/1", "teacher/1", "improvement"]
    assert next(line for line in lines if line.startswith("evaluations_per_image")).split()[1:] == [
        "2",
        "6",
        "4",
        "ok",
    ]
    assert any(
        line.startswith("sampler") and "ddim, 2 steps" in line and "ddim, 6 steps" in line for line in lines
    )
    frechet, (low, high) = decision.judgements["frechet"], decision.judgements["frechet"].challenger_interval
    told = next(line for line in lines if line.startswith("frechet"))
    assert f" {frechet.challenger:.4g} ({low:.4g} to {high:.4g}) " in told
    assert told.endswith("ok" if frechet.passed else "FAILS")
    speed = decision.challenger_cost.images_per_device_second
    assert f" {speed:.4g}" in next(line for line in lines if line.startswith("images_per_device_second"))
    untimed = decision.challenger_cost.model_copy(
        update={"images_per_device_second": None, "images_per_device_second_interval": None}
    )
    lines = table(decision.model_copy(update={"challenger_cost": untimed}))
    assert " not measured" in next(line for line in lines if line.startswith("images_per_device_second"))


def test_a_baseline_without_a_model_is_the_champion_with_another_sampler(
    digits: str, registered: Callable[..., dict[str, ModelVersion]]
) -> None:
    models = registered(new=tiny_card(size=8), old=tiny_card(size=8))
    config = on_digits(digits, baseline={"sampler": MANY})
    decision = decide(config, models["new"], models["old"], no_progress, HERE)
    assert (decision.champion, decision.baseline, decision.verdict) == ("old/1", None, "promoted")
    first = decide(config, models["new"], None, no_progress, HERE)
    assert (first.verdict, first.reason) == ("promoted", "there was no champion")


def test_without_a_baseline_both_models_have_one_sampler(
    digits: str, registered: Callable[..., dict[str, ModelVersion]]
) -> None:
    models = registered(new=tiny_card(size=8), old=tiny_card(size=8))
    decision = decide(on_digits(digits), models["new"], models["old"], no_progress, HERE)
    assert decision.verdict == "refused"
    assert decision.reason.startswith("evaluations_per_image improves by 0; it must be above 0")


@pytest.mark.parametrize(
    ("card", "baseline", "message"),
    [
        (tiny_card(size=8), {"model": "student@challenger"}, "student@challenger is the challenger itself"),
        (
            tiny_card(size=16),
            {"model": "teacher@champion"},
            "student/1 makes images of 1 x 8 x 8, 3 classes, and teacher/1 of 1 x 16 x 16, 3 classes",
        ),
        (tiny_card(size=8, classes=False), {"model": "teacher@champion"}, "8 x 8, no classes"),
        (
            tiny_card(size=8),
            {"model": "teacher@champion", "sampler": SamplerConfig(kind="ddim", num_steps=51)},
            "gate.baseline.sampler: teacher/1: .*num_steps is 51 but the schedule has 50",
        ),
    ],
)
def test_a_baseline_that_cannot_be_compared_is_refused_before_anything_is_sampled(
    card: ModelCard,
    baseline: dict[str, object],
    message: str,
    digits: str,
    registered: Callable[..., dict[str, ModelVersion]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = registered(student=tiny_card(size=8), teacher=card)
    monkeypatch.setattr(promotion, "model_features", None)
    with pytest.raises(UserError, match=message):
        decide(on_digits(digits, baseline=baseline), models["student"], None, no_progress, HERE)


def decided(passes: bool) -> Callable[..., Decision]:
    def decide_at_once(
        config: GateConfig, challenger: ModelVersion, champion: ModelVersion, *_: object
    ) -> Decision:
        return Decision(
            verdict="promoted" if passes else "refused",
            reason="so",
            challenger=challenger.reference,
            champion=champion.reference,
            baseline="teacher/1",
            count=1,
            reference_digest="",
            reference_count=1,
            network="",
            settings=config,
            judgements={},
            decided_at=0,
        )

    return decide_at_once


@pytest.mark.parametrize("passes", [True, False])
def test_the_first_version_of_a_name_is_judged_by_the_baseline_though_it_is_champion(
    passes: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = Models(2)
    connect(models, models, monkeypatch)

    def resolve(reference: str) -> ModelVersion:
        return models.versions(reference.partition("@")[0])[1]

    def workers(*_: object) -> AbstractContextManager[MapWorkers]:
        return nullcontext(HERE)

    monkeypatch.setattr(promotion, "resolve", resolve)
    monkeypatch.setattr(promotion, "decide", decided(passes))
    monkeypatch.setattr(ddpm_pipeline.jobs.promote, "measuring_workers", workers)
    config = PromoteConfig(model="digits", gate=gate(baseline={"model": "teacher@champion"}))
    assert ddpm_pipeline.jobs.promote.run(config, no_progress) == (0 if passes else 1)
    assert models.version_tags[2][VERDICT_TAG] == ("promoted" if passes else "refused")
    assert json.loads(models.version_tags[2][DECISION_TAG])["baseline"] == "teacher/1"
    assert (models.aliases, models.tags) == ({"champion": 2}, {})
    printed = capsys.readouterr().out
    assert ("it is digits@champion already, as the first version of its name" in printed) is not passes
    ddpm_pipeline.jobs.promote.run(config, no_progress)
    assert ("nothing to do" in capsys.readouterr().out) is passes
    ddpm_pipeline.jobs.promote.run(config.model_copy(update={"gate": gate()}), no_progress)
    assert "nothing to do" in capsys.readouterr().out

"""The gate on synthetic models whose order is known."""

import numpy as np
import pytest
from pydantic import ValidationError

from ddpm_pipeline.config.evaluation import GateConfig, Rule
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.bootstrap import draws, statistics
from ddpm_pipeline.evaluate.gate import apply_rules, verdict
from ddpm_pipeline.evaluate.metrics import compute_metrics
from ddpm_pipeline.features.distances import precision_recall
from tests.evaluate.made import config, measured

REAL = measured(400, seed=50)


def gate(**changes: object) -> GateConfig:
    return GateConfig.model_validate({"evaluate": config(), "count": 200, "resamples": 40} | changes)


def test_a_better_model_passes() -> None:
    passes, reason = verdict(apply_rules(measured(seed=1), measured(seed=2, shift=0.8), REAL, gate()))
    assert passes
    assert "frechet" in reason


def test_the_reason_names_what_improved_and_nothing_else() -> None:
    judgements = apply_rules(measured(seed=1), measured(seed=2, shift=0.8), REAL, gate())
    better = [name for name, one in judgements.items() if one.improvement_interval[0] > 0]
    assert "frechet" in better
    assert better != list(judgements)
    assert verdict(judgements) == (True, f"better in {', '.join(better)}; worse in nothing")
    one = measured(seed=1)
    rules = {"frechet": Rule(better="lower", tolerance=0.1)}
    assert verdict(apply_rules(one, one, REAL, gate(rules=rules))) == (True, "worse in nothing")


def test_what_is_worse_within_its_tolerance_is_named() -> None:
    rules = {"frechet": Rule(better="lower", tolerance=1e9)}
    judgements = apply_rules(measured(seed=1, shift=0.8), measured(seed=2), REAL, gate(rules=rules))
    assert verdict(judgements) == (True, "worse in frechet, within tolerance")


def test_a_worse_model_is_refused_with_its_numbers() -> None:
    judgements = apply_rules(measured(seed=1, shift=0.8), measured(seed=2), REAL, gate())
    passes, reason = verdict(judgements)
    assert not passes
    assert "frechet improves by -" in reason
    assert judgements["frechet"].improvement_interval[1] < 0


def test_the_same_model_is_no_improvement() -> None:
    one = measured(seed=1)
    judgements = apply_rules(one, one, REAL, gate())
    assert not verdict(judgements)[0]
    assert judgements["frechet"].improvement_interval == (0, 0)


def test_a_better_distance_does_not_make_up_for_a_worse_accuracy() -> None:
    judgements = apply_rules(measured(seed=1, wrong=30), measured(seed=2, shift=0.8), REAL, gate())
    assert judgements["frechet"].passed
    assert not judgements["class_accuracy"].passed
    assert not verdict(judgements)[0]


def test_a_tolerated_loss_passes() -> None:
    rules = {"class_accuracy": Rule(better="higher", tolerance=0.3)}
    assert verdict(apply_rules(measured(wrong=30), measured(), REAL, gate(rules=rules)))[0]


def test_unequal_conditions_are_refused() -> None:
    with pytest.raises(UserError, match="draw the same number of each"):
        apply_rules(measured(200), measured(150), REAL, gate())
    with pytest.raises(UserError, match="different networks"):
        apply_rules(measured(network="m" * 64), measured(), REAL, gate())


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(ValidationError, match="beauty"):
        gate(rules={"beauty": Rule(better="higher")})


def test_a_metric_that_needs_more_images_is_named() -> None:
    rules = {"recall": Rule(better="higher")}
    with pytest.raises(UserError, match=r"gate\.rules: recall needs more than evaluate\.neighbours \(3\)"):
        apply_rules(measured(3), measured(3), REAL, gate(rules=rules))


def test_weights_of_one_give_the_plain_metrics() -> None:
    samples = measured(seed=3, shift=0.2, wrong=7)
    found, once = compute_metrics(samples, REAL, config()), np.ones(len(samples))
    for name, statistic in statistics(samples, REAL, config()).items():
        assert statistic(once) == pytest.approx(found[name].value, rel=1e-4, abs=1e-9), name


def test_weights_count_samples_as_often_as_they_are_drawn() -> None:
    samples = measured(60, seed=3, shift=0.2, wrong=9)
    weights = next(draws(60, 1, seed=4))
    again = samples.part(np.repeat(np.arange(60), weights.astype(int)))
    for name in (
        "frechet",
        "class_accuracy",
        "inception_score",
        "precision",
        "near_copies",
        "near_copies_features",
    ):
        weighted = statistics(samples, REAL, config())[name](weights)
        assert weighted == pytest.approx(statistics(again, REAL, config())[name](np.ones(60)), rel=1e-9), name


def test_recall_counts_a_sample_once_however_often_it_is_drawn() -> None:
    samples = measured(60, seed=3)
    weights = next(draws(60, 1, seed=4))
    drawn = samples.part(np.flatnonzero(weights))
    whole = statistics(samples, REAL, config())["recall"]
    assert whole(weights) == statistics(drawn, REAL, config())["recall"](np.ones(len(drawn)))
    assert whole(weights) == precision_recall(drawn.vectors, REAL.vectors, config().neighbours)[1]


def test_every_metric_lies_in_its_interval_and_recall_detects_a_model_that_covers_less() -> None:
    names = sorted(statistics(measured(), REAL, config()))
    rules = {name: Rule(better="higher") for name in names}
    narrow, wide = measured(seed=1), measured(seed=2)
    narrow.vectors[:] = narrow.vectors.mean(0) + 0.3 * (narrow.vectors - narrow.vectors.mean(0))
    judgements = apply_rules(wide, narrow, REAL, gate(rules=rules))
    expected = {"frechet", "kernel", "precision", "recall", "near_copies", "near_copies_features"}
    assert expected | {"class_accuracy"} < set(names)
    for name, one in judgements.items():
        low, high = one.challenger_interval
        slack = 0.5 * (
            high - low
        )  # drawing samples again makes a set a little poorer than the one drawn from
        assert low - slack <= one.challenger <= high + slack, (name, one)
    assert judgements["recall"].improvement_interval[0] > 0.2


def test_draws_are_functions_of_the_seed_and_complete() -> None:
    one, again, other = (list(draws(50, 3, seed)) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    assert not all((a == b).all() for a, b in zip(one, other, strict=True))
    assert all(weights.sum() == 50 for weights in one)

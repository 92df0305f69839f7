"""The gate: whether the challenger is better than the champion, and with which confidence.

Metrics of quality are resampled by sample, images per device second by batch. Network evaluations per image are exact:
their intervals have no width. Where the settings name a baseline, it takes the champion's place in the comparison.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import Name
from ddpm_pipeline.config.evaluation import COST_METRICS, MEMBERSHIP, GateConfig, Rule
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.bootstrap import Array, BootstrapEstimate, Statistic, draws, statistics
from ddpm_pipeline.evaluate.measure import describe_sampler
from ddpm_pipeline.evaluate.membership import MembershipLosses, membership_auc, membership_draws
from ddpm_pipeline.evaluate.sampling_cost import BatchTimes, SamplingCost, batch_weights
from ddpm_pipeline.features.feature_set import FeatureSet

_OF_CLASSES = {"class_accuracy", "inception_score"}
"""Metrics that need classes: only some models and feature networks have them."""


@dataclass(frozen=True)
class SampledModel:
    """What the gate drew from one model."""

    features: FeatureSet
    evaluations_per_image: int
    times: BatchTimes
    """Of its full batches."""
    membership: MembershipLosses | None = None
    """Its losses, where a rule asks for membership inference."""


class Judgement(Settings):
    """One metric of both models."""

    rule: Rule
    """What the settings require."""
    challenger: float
    """The challenger's value."""
    challenger_interval: tuple[float, float]
    """Its confidence interval."""
    champion: float
    """The champion's value, or that of the baseline."""
    champion_interval: tuple[float, float]
    """Its confidence interval."""
    improvement: float
    """Difference of the two, positive where the challenger is better."""
    improvement_interval: tuple[float, float]
    """Its confidence interval. Both models are resampled together, so noise that they share cancels."""
    passed: bool
    """Whether the rule is met."""


class Decision(Settings):
    """A decision of the gate, with all its numbers."""

    format: Literal[1] = 1
    """Version of this document's layout."""
    verdict: Literal["promoted", "refused"]
    """The outcome."""
    reason: str
    """Why, in one line."""
    challenger: str
    """`name/version` of the challenger."""
    champion: str | None
    """`name/version` of the champion at that time; None without one."""
    baseline: str | None = Field(default=None, exclude_if=lambda baseline: baseline is None)
    """`name/version` of the model that the challenger was compared with; left out if that was the champion."""
    count: int
    """Samples of each."""
    reference_digest: str
    """Digest of the reference data set."""
    reference_count: int
    """Its images."""
    network: str
    """Identity of the feature network."""
    gpu: Name | None = Field(default=None, exclude_if=lambda gpu: gpu is None)
    """Model of the GPU that sampled and measured both; left out if CPUs did."""
    settings: GateConfig
    """How they were compared."""
    judgements: dict[str, Judgement]
    """By metric."""
    challenger_cost: SamplingCost | None = Field(default=None, exclude_if=lambda cost: cost is None)
    """Cost of the challenger's samples; None if none were drawn, and in decisions of versions that did not state it."""
    champion_cost: SamplingCost | None = Field(default=None, exclude_if=lambda cost: cost is None)
    """The same of the champion, or of the baseline."""
    decided_at: float
    """Seconds since 1970 (UTC)."""


def judge(
    challenger: SampledModel, champion: SampledModel, real: FeatureSet, config: GateConfig
) -> dict[str, Judgement]:
    """Apply every rule that both models admit, in the order of the settings.

    UserError for unequal conditions, or when no rule applies.
    """
    others = {*COST_METRICS, MEMBERSHIP}
    rules = {name: rule for name, rule in config.rules.items() if name not in others}
    judgements = _judge_cost(challenger, champion, config) | _judge_membership(challenger, champion, config)
    if rules:
        quality = config.model_copy(update={"rules": rules})
        judgements |= apply_rules(challenger.features, champion.features, real, quality)
    return {name: judgements[name] for name in config.rules if name in judgements}


def _judge_cost(challenger: SampledModel, champion: SampledModel, config: GateConfig) -> dict[str, Judgement]:
    judgements: dict[str, Judgement] = {}
    for name, rule in config.rules.items():
        if name == "evaluations_per_image":
            exact = [_constant(one.evaluations_per_image) for one in (challenger, champion)]
            judgements[name] = _apply(config, rule, exact[0], exact[1], [np.ones(1)])
        elif name == "images_per_device_second":
            speeds = [one.times.images_per_second() for one in (challenger, champion)]
            weights = batch_weights(len(challenger.times), config)
            judgements[name] = _apply(config, rule, speeds[0], speeds[1], weights)
    return judgements


def _judge_membership(
    challenger: SampledModel, champion: SampledModel, config: GateConfig
) -> dict[str, Judgement]:
    """The rule of membership inference. Both models are resampled together: their losses are of the same images."""
    rule, ours, theirs = config.rules.get(MEMBERSHIP), challenger.membership, champion.membership
    if rule is None or ours is None or theirs is None:
        return {}
    weights = list(membership_draws(ours, config.resamples, config.seed))
    return {MEMBERSHIP: _apply(config, rule, membership_auc(ours), membership_auc(theirs), weights)}


def _constant(value: float) -> Statistic:
    return lambda weights: float(value)


def apply_rules(
    challenger: FeatureSet, champion: FeatureSet, real: FeatureSet, config: GateConfig
) -> dict[str, Judgement]:
    """Apply every rule of quality that both models admit. UserError for unequal conditions, or when no rule applies."""
    if len(challenger) != len(champion):
        raise UserError(
            f"gate: {len(challenger)} samples of the challenger and {len(champion)} of the champion cannot be "
            "compared; draw the same number of each"
        )
    if len({challenger.network, champion.network, real.network}) > 1:
        raise UserError(
            "gate: challenger, champion and reference have features of different networks; evaluate with one"
        )
    of_challenger, of_champion = (statistics(one, real, config.evaluate) for one in (challenger, champion))
    missing = sorted(config.rules.keys() - _OF_CLASSES - of_challenger.keys())
    if missing:
        raise UserError(
            f"gate.rules: {missing[0]} needs more than evaluate.neighbours ({config.evaluate.neighbours}) images of "
            "the models and of the reference; raise gate.count or choose another metric"
        )
    rules = {
        name: rule for name, rule in config.rules.items() if name in of_challenger and name in of_champion
    }
    if not rules:
        raise UserError("gate.rules: these models have none of the metrics; choose another, such as frechet")
    weights = list(draws(len(challenger), config.resamples, config.seed))
    return {
        name: _apply(config, rule, of_challenger[name], of_champion[name], weights)
        for name, rule in rules.items()
    }


def verdict(judgements: dict[str, Judgement]) -> tuple[bool, str]:
    """Whether the challenger passes, and why or why not."""
    failed = [name for name, one in judgements.items() if not one.passed]
    if failed:
        return False, "; ".join(_complaint(name, judgements[name]) for name in failed)
    better = [name for name, one in judgements.items() if one.improvement_interval[0] > 0]
    worse = [name for name, one in judgements.items() if one.improvement_interval[1] < 0]
    gains = [f"better in {', '.join(better)}"] if better else []
    losses = f"worse in {', '.join(worse)}, within tolerance" if worse else "worse in nothing"
    return True, "; ".join([*gains, losses])


def _apply(
    config: GateConfig,
    rule: Rule,
    of_challenger: Statistic,
    of_champion: Statistic,
    weights: Sequence[Array],
) -> Judgement:
    """One rule, with all draws of `weights`."""
    sign = 1.0 if rule.better == "higher" else -1.0
    challenger = BootstrapEstimate.of(of_challenger, weights)
    champion = BootstrapEstimate.of(of_champion, weights)
    improvement = BootstrapEstimate(  # + 0.0, or models of equal cost would differ by -0
        sign * (challenger.value - champion.value) + 0.0,
        sign * (challenger.resampled - champion.resampled) + 0.0,
    )
    low, high = improvement.interval(config.confidence)
    return Judgement(
        rule=rule,
        challenger=challenger.value,
        challenger_interval=challenger.interval(config.confidence),
        champion=champion.value,
        champion_interval=champion.interval(config.confidence),
        improvement=improvement.value,
        improvement_interval=(low, high),
        passed=low > 0 if rule.must == "improve" else low >= -rule.tolerance,
    )


def _complaint(name: str, one: Judgement) -> str:
    low, high = one.improvement_interval
    bound = "above 0" if one.rule.must == "improve" else f"at least {-one.rule.tolerance:g}"
    whole = "it" if low == high == one.improvement else "all of the interval"
    return f"{name} improves by {_cell(one.improvement, (low, high))}; {whole} must be {bound}"


def table(decision: Decision) -> list[str]:
    """The decision, a line for each metric, and what samples of each model cost."""
    champion = decision.baseline or decision.champion or "none"
    lines = [f"{'metric':<26}{decision.challenger:>34}{champion:>34}{'improvement':>30}"]
    for name, one in decision.judgements.items():
        cells = (
            _cell(one.challenger, one.challenger_interval),
            _cell(one.champion, one.champion_interval),
            _cell(one.improvement, one.improvement_interval),
        )
        mark = "ok" if one.passed else "FAILS"
        lines.append(f"{name:<26}{cells[0]:>34}{cells[1]:>34}{cells[2]:>30}  {mark}")
    costs = decision.challenger_cost, decision.champion_cost
    for name, cell in _COST_CELLS.items():
        if name not in decision.judgements and all(costs):
            cells = [cell(cost) for cost in costs if cost is not None]
            lines.append(f"{name:<26}{cells[0]:>34}{cells[1]:>34}")
    return lines


def _cell(value: float, span: tuple[float, float] | None) -> str:
    if span is None or span == (value, value):
        return f"{value:.4g}"
    return f"{value:.4g} ({span[0]:.4g} to {span[1]:.4g})"


def _speed_cell(cost: SamplingCost) -> str:
    speed = cost.images_per_device_second
    return "not measured" if speed is None else _cell(speed, cost.images_per_device_second_interval)


_COST_CELLS: dict[str, Callable[[SamplingCost], str]] = {
    "sampler": lambda cost: describe_sampler(cost.sampler),
    "evaluations_per_image": lambda cost: f"{cost.evaluations_per_image:,}",
    "images_per_device_second": _speed_cell,
}

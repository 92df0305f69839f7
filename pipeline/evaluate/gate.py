"""The gate: is the challenger better than the champion, and how sure is that?"""

from typing import Literal

import numpy as np

from pipeline.config.base import Settings
from pipeline.config.evaluation import GateConfig, Rule
from pipeline.errors import UserError
from pipeline.evaluate.bootstrap import Statistic, draws, interval, statistics
from pipeline.features.feature_set import FeatureSet

_OF_CLASSES = {"class_accuracy", "inception_score"}
"""Figures that only some models and feature networks admit."""


class Judgement(Settings):
    """One figure of both models."""

    rule: Rule
    """What was asked."""
    challenger: float
    """The challenger's figure."""
    challenger_interval: tuple[float, float]
    """Where it lies with the gate's confidence."""
    champion: float
    """The champion's figure."""
    champion_interval: tuple[float, float]
    """Where it lies with the gate's confidence."""
    improvement: float
    """Challenger over champion, positive when better."""
    improvement_interval: tuple[float, float]
    """Where the improvement lies; both were drawn together, so noise that they share cancels."""
    passed: bool
    """Whether the rule is met."""


class Decision(Settings):
    """What the gate decided, with all its numbers."""

    format: Literal[1] = 1
    """Version of this document's layout."""
    verdict: Literal["promoted", "refused"]
    """What came of it."""
    reason: str
    """Why, in one line."""
    challenger: str
    """`name/version` of the challenger."""
    champion: str | None
    """`name/version` of the champion then in office."""
    count: int
    """Samples of each."""
    reference_digest: str
    """Digest of the reference data set."""
    reference_count: int
    """Its images."""
    network: str
    """Identity of the feature network."""
    settings: GateConfig
    """How they were compared."""
    judgements: dict[str, Judgement]
    """By figure."""
    decided_at: float
    """Seconds since 1970 (UTC)."""


def judge(
    challenger: FeatureSet, champion: FeatureSet, real: FeatureSet, config: GateConfig
) -> dict[str, Judgement]:
    """Every rule that both models admit. UserError for terms that are not equal, or when no rule can be judged."""
    if len(challenger) != len(champion):
        raise UserError(
            f"gate: {len(challenger)} samples of the challenger and {len(champion)} of the champion cannot be "
            "compared; make equally many"
        )
    if len({challenger.network, champion.network, real.network}) > 1:
        raise UserError("gate: challenger, champion and reference were measured by different networks")
    ours, theirs = (statistics(one, real, config.evaluate) for one in (challenger, champion))
    missing = sorted(config.rules.keys() - _OF_CLASSES - ours.keys())
    if missing:
        raise UserError(
            f"gate.rules: {missing[0]} needs more than evaluate.neighbours ({config.evaluate.neighbours}) images of "
            "the models and of the reference; raise gate.count or ask for another figure"
        )
    rules = {name: rule for name, rule in config.rules.items() if name in ours and name in theirs}
    if not rules:
        raise UserError(
            "gate.rules: none of the figures exists for these models; ask for another, such as frechet"
        )
    weights = list(draws(len(challenger), config.resamples, config.seed))
    return {name: _judge(config, rule, ours[name], theirs[name], weights) for name, rule in rules.items()}


def verdict(judgements: dict[str, Judgement]) -> tuple[bool, str]:
    """Whether the challenger passes, and why or why not."""
    failed = [name for name, one in judgements.items() if not one.passed]
    if failed:
        return False, "; ".join(_complaint(name, judgements[name]) for name in failed)
    improved = [name for name, one in judgements.items() if one.improvement_interval[0] > 0]
    return True, f"better in {', '.join(improved)}; worse in nothing" if improved else "worse in nothing"


def _judge(
    config: GateConfig,
    rule: Rule,
    ours: Statistic,
    theirs: Statistic,
    weights: list[np.ndarray[tuple[int], np.dtype[np.float64]]],
) -> Judgement:
    sign = 1.0 if rule.better == "higher" else -1.0
    once = np.ones_like(weights[0])
    mine, other = ours(once), theirs(once)
    a = np.array([ours(w) for w in weights])
    b = np.array([theirs(w) for w in weights])
    own, his, gain = (
        interval(value, values, config.confidence)
        for value, values in ((mine, a), (other, b), (sign * (mine - other), sign * (a - b)))
    )
    passed = gain.low > 0 if rule.must == "improve" else gain.low >= -rule.tolerance
    return Judgement(
        rule=rule,
        challenger=mine,
        challenger_interval=(own.low, own.high),
        champion=other,
        champion_interval=(his.low, his.high),
        improvement=gain.value,
        improvement_interval=(gain.low, gain.high),
        passed=passed,
    )


def _complaint(name: str, one: Judgement) -> str:
    low, high = one.improvement_interval
    asked = "surely above 0" if one.rule.must == "improve" else f"surely at least {-one.rule.tolerance:g}"
    return f"{name} improves by {one.improvement:.4g} ({low:.4g} to {high:.4g}), {asked} is asked"


def table(decision: Decision) -> list[str]:
    """The decision, a line a figure."""
    champion = decision.champion or "none"
    lines = [f"{'figure':<16}{decision.challenger:>28}{champion:>28}{'improvement':>30}"]
    for name, one in decision.judgements.items():
        cells = (
            _cell(one.challenger, one.challenger_interval),
            _cell(one.champion, one.champion_interval),
            _cell(one.improvement, one.improvement_interval),
        )
        mark = "ok" if one.passed else "FAILS"
        lines.append(f"{name:<16}{cells[0]:>28}{cells[1]:>28}{cells[2]:>30}  {mark}")
    return lines


def _cell(value: float, span: tuple[float, float]) -> str:
    return f"{value:.4g} ({span[0]:.4g} to {span[1]:.4g})"

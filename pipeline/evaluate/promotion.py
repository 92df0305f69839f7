"""Promotion and rollback of a registered model's champion.

A challenger becomes champion only when it passes the gate, against the champion or the baseline of the settings. Every
decision, with all its numbers, is stored as tags of the challenger's model version. The champion's alias moves by a
log (`ddpm_pipeline.tracking.alias_log`), so that of two concurrent decisions against one champion only one moves it.
The log also names the version that a promoted one replaced, so that rollback is one command.
"""

import json
import time
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.evaluation import MEMBERSHIP, GateConfig, PromoteConfig
from ddpm_pipeline.config.generation import SpecSettings
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.errors import JobError, UserError
from ddpm_pipeline.evaluate.gate import Decision, Judgement, SampledModel, judge, verdict
from ddpm_pipeline.evaluate.measure import losses_of_model, model_features, require_unseen_noise
from ddpm_pipeline.evaluate.membership import MembershipLosses
from ddpm_pipeline.evaluate.sampling_cost import BatchTimes, SamplingCost, evaluations_of, sampling_cost
from ddpm_pipeline.evaluate.signed_decision import SIGNATURE_TAG, sign_decision
from ddpm_pipeline.features.feature_set import FeatureSet
from ddpm_pipeline.features.networks import open_network
from ddpm_pipeline.features.reference_set import data_root, load_reference
from ddpm_pipeline.features.trust import require_trusted_network, require_trusted_reference
from ddpm_pipeline.generate.model_source import find_model
from ddpm_pipeline.generate.spec import make_spec
from ddpm_pipeline.parallel import HERE, MapWorkers, OpenWorkers, in_process
from ddpm_pipeline.progress import Progress, no_progress
from ddpm_pipeline.signatures import SigningKey
from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.tracking import (
    AliasHistory,
    LoggedAlias,
    MeasuredOn,
    ModelVersion,
    Move,
    MoveConflictError,
    log_model_metrics,
    resolve,
    set_version_tags,
    versions,
)

VERDICT_TAG = "ddpm.gate"
DECISION_TAG = "ddpm.gate.decision"
BEFORE_TAG = "ddpm.gate.before"
_TAG_LIMIT = 7500  # MLflow cuts tags at 8000 characters


class Side(NamedTuple):
    """A model in the comparison."""

    reference: str
    """`name/version`."""
    sampler: SamplerConfig


class _Drawn(NamedTuple):
    """What a worker returns of a side."""

    features: bytes
    """`FeatureSet.to_bytes`."""
    evaluations_per_image: int
    times: BatchTimes
    membership: MembershipLosses | None


def promote(
    config: PromoteConfig,
    progress: Progress,
    open_workers: OpenWorkers = in_process,
    used_gpus: bool = False,
) -> Decision | None:
    """Compare challenger and champion, record the decision, move the alias if the challenger passed.

    `used_gpus`: whether the model's jobs use GPUs. None where the challenger is the champion already, unless it became
    so as the first of its name and the settings name another model to compare it with.
    MoveConflictError when another decision moved the alias first.
    """
    SigningKey.configured()  # a key that cannot be used is refused before any work
    challenger = resolve(f"{config.model}@{config.challenger}")
    champion, log = read_champion(config.model, config.champion)
    if _is_champion(challenger, champion) and not _needs_baseline(config.gate, challenger):
        tag_promotion(challenger, config.champion)
        return None
    with open_workers(used_gpus) as workers:
        decision = decide(config.gate, challenger, champion, progress, workers)
    record(decision, challenger, champion, config.champion, log.number())
    return decision


def promote_after_training(
    gate: GateConfig,
    challenger: ModelVersion,
    open_workers: OpenWorkers = in_process,
    used_gpus: bool = False,
) -> str:
    """Run the gate on a model that was just registered; returns a line with the outcome.

    An error of the gate, such as a missing feature network, becomes that line: it fails no finished training.
    """
    champion, log = read_champion(challenger.name, "champion")
    if _is_champion(challenger, champion) and not _needs_baseline(gate, challenger):
        return f"gate     {challenger.reference} is the champion already"
    try:
        with open_workers(used_gpus) as workers:
            decision = decide(gate, challenger, champion, no_progress, workers)
        record(decision, challenger, champion, "champion", log.number())
    except (UserError, JobError) as error:
        return f"gate     not run: {error}; then: ddpm promote"
    return f"gate     {decision.verdict}: {decision.reason}"


def _is_champion(challenger: ModelVersion, champion: ModelVersion | None) -> bool:
    return champion is not None and champion.version == challenger.version


def _needs_baseline(gate: GateConfig, champion: ModelVersion) -> bool:
    """Whether a champion was never compared with the model that the gate names: the first of a name is not."""
    return gate.names_baseline and champion.tags.get(VERDICT_TAG) != "promoted"


def read_champion(name: str, alias: str) -> tuple[ModelVersion | None, AliasHistory]:
    """The champion, or None, and the alias's history. An alias that is behind its log is moved forward first."""
    known = versions(name)
    if not known:  # nor is there a model that could have aliases
        return None, AliasHistory(None, {}, {}, {})
    history = LoggedAlias(name, alias).reconcile()
    return next((version for version in known if version.version == history.version), None), history


def decide(
    gate: GateConfig,
    challenger: ModelVersion,
    champion: ModelVersion | None,
    progress: Progress,
    workers: MapWorkers = HERE,
) -> Decision:
    """Sample both models from the same noise on the same kind of device, extract features, apply the rules.

    Without a champion and without a baseline the challenger passes. UserError where the feature network or the
    reference is not the one that is trusted for this model, and for a baseline that it cannot be compared with.
    """
    baseline = _baseline(gate, challenger)
    sides = _sides(gate, challenger, baseline or champion)
    if gate.baseline is not None and sides is not None:
        _require_alike(gate, *sides)
    network, data = gate.evaluate.network, data_root(gate.evaluate.reference)
    require_trusted_network(challenger.name, network, data, open_network(network, data))
    index = load_index(gate.evaluate.reference)
    reference = load_reference(index, network, gate.evaluate.batch_size, workers)
    require_trusted_reference(challenger.name, index, network, data, reference, workers.gpu)
    judgements: dict[str, Judgement] = {}
    costs: list[SamplingCost | None] = [None, None]
    if sides is None:
        passes, reason = True, "there was no champion"
    else:
        models: list[SampledModel] = []
        for side, drawn in zip(sides, workers.map(partial(_draw, gate, workers.gpu), sides), strict=True):
            features = FeatureSet.from_bytes(drawn.features, side.reference)
            models.append(SampledModel(features, drawn.evaluations_per_image, drawn.times, drawn.membership))
            progress(len(models), 2, side.reference)
        costs = [
            sampling_cost(side.sampler, model.evaluations_per_image, model.times, gate)
            for side, model in zip(sides, models, strict=True)
        ]
        judgements = judge(models[0], models[1], reference, gate)
        passes, reason = verdict(judgements)
    return Decision(
        verdict="promoted" if passes else "refused",
        reason=reason,
        challenger=challenger.reference,
        champion=None if champion is None else champion.reference,
        baseline=None if baseline is None else baseline.reference,
        count=gate.count,
        reference_digest=index.digest,
        reference_count=len(reference),
        network=reference.network,
        gpu=workers.gpu,
        settings=gate,
        judgements=judgements,
        challenger_cost=costs[0],
        champion_cost=costs[1],
        decided_at=time.time(),
    )


def _baseline(gate: GateConfig, challenger: ModelVersion) -> ModelVersion | None:
    """The model that the settings name as baseline; None if they name none. UserError for the challenger itself."""
    if gate.baseline is None or gate.baseline.model is None:
        return None
    baseline = resolve(gate.baseline.model)
    if baseline.reference == challenger.reference:
        raise UserError(
            f"gate.baseline.model: {gate.baseline.model} is the challenger itself; name the model to compare it with"
        )
    return baseline


def _sides(
    gate: GateConfig, challenger: ModelVersion, compared: ModelVersion | None
) -> tuple[Side, Side] | None:
    """The challenger and what it is compared with, each with its sampler; None if there is nothing to compare."""
    if compared is None:
        return None
    own = None if gate.baseline is None else gate.baseline.sampler
    return Side(challenger.reference, gate.sampler), Side(compared.reference, own or gate.sampler)


def _require_alike(gate: GateConfig, challenger: Side, baseline: Side) -> None:
    """UserError, before anything is sampled, unless both models make such images, each with its sampler."""
    made: list[str] = []
    for side, setting in ((challenger, "gate.sampler"), (baseline, "gate.baseline.sampler")):
        card = find_model(side.reference).card
        require_unseen_noise(card, side.reference, gate.seed, 0, gate.count)
        try:
            make_spec(_settings(gate, side), card)
        except UserError as error:
            raise type(error)(f"{setting}: {side.reference}: {error}") from None
        classes = f"{card.net.num_classes} classes" if card.net.num_classes else "no classes"
        made.append(f"{card.image.channels} x {card.image.size} x {card.image.size}, {classes}")
    if made[0] != made[1]:
        raise UserError(
            f"gate.baseline: {challenger.reference} makes images of {made[0]}, and {baseline.reference} of {made[1]}; "
            "name a baseline that makes the same"
        )


def record(
    decision: Decision, challenger: ModelVersion, champion: ModelVersion | None, alias: str, seen_number: int
) -> None:
    """Store the decision as tags of the challenger's version; if it passed, move the alias, then tag it as promoted.

    `seen_number`: number of the alias's newest move when `champion` was read. MoveConflictError, with the alias
    untouched, when it was moved since, be it away and back.
    """
    _log_judgements(decision, challenger)
    text = redact(json.dumps(decision.model_dump(mode="json", exclude_defaults=True), separators=(",", ":")))
    if len(text) > _TAG_LIMIT:
        raise UserError(
            f"gate.rules: the decision takes {len(text)} characters, a tag holds {_TAG_LIMIT}; set fewer rules"
        )
    signer, signature = SigningKey.configured(), dict[str, str]()
    if signer is not None:
        signature[SIGNATURE_TAG] = sign_decision(signer, challenger, decision.verdict, text)
    if decision.verdict != "promoted":
        set_version_tags(challenger, {VERDICT_TAG: decision.verdict, DECISION_TAG: text} | signature)
        return
    set_version_tags(challenger, {DECISION_TAG: text} | signature)
    if _is_champion(challenger, champion):  # only its comparison with the baseline was missing
        set_version_tags(challenger, {VERDICT_TAG: decision.verdict})
        return
    before = None if champion is None else champion.version
    logged = LoggedAlias(challenger.name, alias)
    try:
        move = logged.move(before, challenger.version, "promotion", seen_number=seen_number)
    except MoveConflictError:
        moves = logged.read().moves.values()
        if not any((move.kind, move.after) == ("promotion", challenger.version) for move in moves):
            set_version_tags(challenger, {VERDICT_TAG: "not promoted: another decision came first"})
        raise
    set_version_tags(challenger, _promotion_tags(move))


def _log_judgements(decision: Decision, challenger: ModelVersion) -> None:
    """The challenger's metrics on its page, and on its training's, as `gate/frechet`."""
    if challenger.model_id is None or not challenger.run_id or not decision.judgements:
        return
    values = {f"gate/{name}": judgement.challenger for name, judgement in decision.judgements.items()}
    reference = decision.settings.evaluate.reference.rstrip("/").rsplit("/", 1)[-1]
    step = challenger.tags.get("step", "")
    log_model_metrics(
        challenger.run_id,
        challenger.model_id,
        values,
        int(step) if step.isascii() and step.isdecimal() else 0,
        decision.decided_at,
        MeasuredOn(reference, decision.reference_digest),
    )


def tag_promotion(champion: ModelVersion, alias: str) -> None:
    """Add the tags that are missing on a champion whose promotion was killed after it had moved the alias."""
    move = LoggedAlias(champion.name, alias).read().last
    if move is not None and (move.kind, move.after) == ("promotion", champion.version):
        missing = {k: v for k, v in _promotion_tags(move).items() if champion.tags.get(k) != v}
        set_version_tags(champion, missing)


def _promotion_tags(move: Move) -> dict[str, str]:
    return {VERDICT_TAG: "promoted"} | ({} if move.before is None else {BEFORE_TAG: str(move.before)})


def roll_back(name: str, alias: str = "champion", to: int | None = None) -> str:
    """Make the champion's predecessor, or version `to`, the champion again. Returns a line that says what was done.

    Repeated, it changes nothing. UserError without a champion, and without a version to go back to.
    """
    if not name:
        raise UserError("rollback: name the registered model, for example: ddpm rollback digits")
    champion, log = read_champion(name, alias)
    if champion is None:
        raise UserError(f"model {name!r}: has no {alias}; see its versions in the registry")
    last = log.last
    back = last if last is not None and last.kind == "rollback" and last.after == champion.version else None
    if to == champion.version or (to is None and back is not None):
        if back is not None:
            _tag_rollback(back, name)
        return f"nothing to do: {_already(champion, back, alias)}"
    before = to or _predecessor(champion, log.moves)
    if before is None:
        raise UserError(
            f"model {champion.reference}: replaced no version; name the one to go back to: --to VERSION"
        )
    previous = resolve(f"{name}/{before}")
    move = LoggedAlias(name, alias).move(
        champion.version, previous.version, "rollback", seen_number=log.number()
    )
    _tag_rollback(move, name)
    return f"rolled back: {name}@{alias} is {previous.reference} again, no longer {champion.reference}"


def _predecessor(champion: ModelVersion, moves: Mapping[int, Move]) -> int | None:
    """The version that the champion replaced when promoted: from the log or, in older registries, from its tag."""
    for number in sorted(moves, reverse=True):
        if moves[number].after == champion.version and moves[number].kind == "promotion":
            return moves[number].before
    tag = champion.tags.get(BEFORE_TAG, "")
    return int(tag) if tag.isascii() and tag.isdecimal() else None


def _already(champion: ModelVersion, back: Move | None, alias: str) -> str:
    """The state that a rollback finds when it was done before."""
    now = f"{champion.name}@{alias} is {champion.reference}"
    if back is None:
        return now
    return f"{now}, rolled back from {champion.name}/{back.before} at {_utc(back.at)}; to go back further: --to VERSION"


def _tag_rollback(move: Move, name: str) -> None:
    """Tag the version that was replaced."""
    replaced = next((version for version in versions(name) if version.version == move.before), None)
    if replaced is not None:
        set_version_tags(replaced, {VERDICT_TAG: f"rolled back to {name}/{move.after} at {_utc(move.at)}"})


def _utc(seconds: float) -> str:
    return f"{time.strftime('%F %T', time.gmtime(seconds))}Z"


def _settings(gate: GateConfig, side: Side) -> SpecSettings:
    """The settings of the samples that the gate draws from a side."""
    return SpecSettings(
        model=side.reference,
        count=gate.count,
        seed=gate.seed,
        sampler=side.sampler,
        shard_size=gate.count,
        batch_size=min(gate.batch_size, gate.count),
    )


def _draw(gate: GateConfig, gpu: str | None, side: Side) -> _Drawn:
    """Samples of a side, as their features, with what they cost."""
    model, settings, times = find_model(side.reference), _settings(gate, side), BatchTimes()
    features = model_features(model, settings, gate.evaluate, gpu, times.add)
    membership = None
    if MEMBERSHIP in gate.rules and gate.evaluate.membership is not None:
        membership = losses_of_model(
            model, gate.evaluate.membership, gate.seed, workers=MapWorkers(HERE.map, gpu)
        )
    return _Drawn(
        features.to_bytes(),
        evaluations_of(model.card, side.sampler),
        times.steady(settings.batch_size),
        membership,
    )

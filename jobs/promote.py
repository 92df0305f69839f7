"""The registry's gate: `ddpm promote digits`, and `ddpm rollback digits`.

A challenger becomes champion only when it passes. Every decision, with all its numbers, is kept on the challenger's
model version as tags. The champion's alias moves by a log (`pipeline.tracking.alias_log`), so that of two decisions
made at once against one champion only one moves it; the log also tells whom a promoted version replaced, which
makes going back one command.
"""

import json
import time
from collections.abc import Mapping

from jobs.evaluate import measure_model
from jobs.runner import DONE, FAILED, JobArguments, run_job, use_running_stack
from pipeline.config.evaluation import GateConfig, PromoteConfig
from pipeline.config.generation import SpecSettings
from pipeline.data.index import load_index
from pipeline.errors import JobError, UserError
from pipeline.evaluate.gate import Decision, judge, table, verdict
from pipeline.features.feature_set import FeatureSet
from pipeline.features.networks import open_network
from pipeline.features.reference_set import data_root, load_reference
from pipeline.features.trust import require_trusted_network, require_trusted_reference
from pipeline.progress import Progress, no_progress
from pipeline.telemetry.terminal import echo, echo_json
from pipeline.tracking import (
    LoggedAlias,
    ModelVersion,
    Move,
    MoveConflictError,
    resolve,
    set_version_tags,
    versions,
)

VERDICT_TAG = "ddpm.gate"
DECISION_TAG = "ddpm.gate.decision"
BEFORE_TAG = "ddpm.gate.before"
_TAG_LIMIT = 7500  # MLflow cuts tags at 8000 characters


def run_call(call: JobArguments) -> int:
    """Run the job that a call describes."""
    return run_job("promote", PromoteConfig, lambda c, p: run(c, p, call.as_json), call, unit="models")


def run(config: PromoteConfig, progress: Progress, as_json: bool = False) -> int:
    """Compare, decide, and say so."""
    challenger = resolve(f"{config.model}@{config.challenger}")
    champion = champion_of(config.model, config.champion)
    if champion is not None and champion.version == challenger.version:
        note_promotion(challenger, config.champion)
        echo(f"nothing to do: {challenger.reference} is the champion already")
        return DONE
    decision = decide(config.gate, challenger, champion, progress)
    keep(decision, challenger, champion, config.champion)
    if as_json:
        echo_json(decision.model_dump(mode="json"))
    else:
        echo(*table(decision))
        echo(f"{decision.verdict}: {decision.challenger}: {decision.reason}")
    return DONE if decision.verdict == "promoted" else FAILED


def after_training(gate: GateConfig, challenger: ModelVersion) -> str:
    """Run the gate on a model that was just registered; returns a line that says how it went.

    What keeps the gate from judging, such as a missing feature network, is said and fails no finished training.
    """
    champion = champion_of(challenger.name)
    if champion is not None and champion.version == challenger.version:
        return f"gate     {challenger.reference} is the champion already"
    try:
        decision = decide(gate, challenger, champion, no_progress)
        keep(decision, challenger, champion, "champion")
    except (UserError, JobError) as error:
        return f"gate     not run: {error}; then: ddpm promote"
    return f"gate     {decision.verdict}: {decision.reason}"


def champion_of(name: str, alias: str = "champion") -> ModelVersion | None:
    """The version in office, or None. An alias that was left behind its log is moved forward first."""
    known = versions(name)
    if not known:
        return None
    office = LoggedAlias(name, alias).follow().version
    return next((version for version in known if version.version == office), None)


def decide(
    gate: GateConfig, challenger: ModelVersion, champion: ModelVersion | None, progress: Progress
) -> Decision:
    """Sample both models from the same noise, measure, judge. A first version has no one to beat.

    UserError where the feature network or the measured reference is not the one that is trusted for this model.
    """
    judge_by, data = gate.evaluate.network, data_root(gate.evaluate.reference)
    require_trusted_network(challenger.name, judge_by, data, open_network(judge_by, data))
    index = load_index(gate.evaluate.reference)
    real = load_reference(index, judge_by, gate.evaluate.batch_size)
    require_trusted_reference(challenger.name, index, judge_by, data, real)
    if champion is None:
        judgements, passes, reason = {}, True, "there was no champion"
    else:
        measured: list[FeatureSet] = []
        for version in (challenger, champion):
            measured.append(_sampled(version, gate))
            progress(len(measured), 2, version.reference)
        judgements = judge(measured[0], measured[1], real, gate)
        passes, reason = verdict(judgements)
    return Decision(
        verdict="promoted" if passes else "refused",
        reason=reason,
        challenger=challenger.reference,
        champion=None if champion is None else champion.reference,
        count=gate.count,
        reference_digest=index.digest,
        reference_count=len(real),
        network=real.network,
        settings=gate,
        judgements=judgements,
        decided_at=time.time(),
    )


def keep(decision: Decision, challenger: ModelVersion, champion: ModelVersion | None, alias: str) -> None:
    """Write the decision onto the challenger's version; if it passed, move the alias, and then say so there.

    MoveConflictError, with the alias untouched, when `champion` is not in office any more.
    """
    text = json.dumps(decision.model_dump(mode="json", exclude_defaults=True), separators=(",", ":"))
    if len(text) > _TAG_LIMIT:
        raise UserError(
            f"gate.rules: the decision takes {len(text)} characters, a tag holds {_TAG_LIMIT}; ask less"
        )
    if decision.verdict != "promoted":
        set_version_tags(challenger, {VERDICT_TAG: decision.verdict, DECISION_TAG: text})
        return
    set_version_tags(challenger, {DECISION_TAG: text})
    before = None if champion is None else champion.version
    office = LoggedAlias(challenger.name, alias)
    try:
        move = office.move(before, challenger.version, "promotion")
    except MoveConflictError:
        moves = office.read().moves.values()
        if not any((move.kind, move.after) == ("promotion", challenger.version) for move in moves):
            set_version_tags(challenger, {VERDICT_TAG: "not promoted: another decision came first"})
        raise
    set_version_tags(challenger, _promoted(move))


def note_promotion(champion: ModelVersion, alias: str) -> None:
    """Tag a champion as promoted that was promoted by a job which was killed before it could say so."""
    move = LoggedAlias(champion.name, alias).read().last
    if move is not None and (move.kind, move.after) == ("promotion", champion.version):
        missing = {k: v for k, v in _promoted(move).items() if champion.tags.get(k) != v}
        set_version_tags(champion, missing)


def _promoted(move: Move) -> dict[str, str]:
    return {VERDICT_TAG: "promoted"} | ({} if move.before is None else {BEFORE_TAG: str(move.before)})


def rollback(name: str, alias: str = "champion", to: int | None = None) -> int:
    """Put the champion's predecessor, or version `to`, back into office. Repeated, it finds itself done."""
    if not name:
        raise UserError("rollback: name the registered model, for example: ddpm rollback digits")
    use_running_stack()
    champion = champion_of(name, alias)
    if champion is None:
        raise UserError(f"model {name!r}: has no {alias}; see its versions in the registry")
    office = LoggedAlias(name, alias)
    seen = office.read()
    last = seen.last
    back = last if last is not None and last.kind == "rollback" and last.after == champion.version else None
    if to == champion.version or (to is None and back is not None):
        if back is not None:
            _note_rollback(back, name)
        echo(f"nothing to do: {_already(champion, back, alias)}")
        return DONE
    before = to or _predecessor(champion, seen.moves)
    if before is None:
        raise UserError(f"model {champion.reference}: replaced no one, so there is no version to go back to")
    previous = resolve(f"{name}/{before}")
    _note_rollback(office.move(champion.version, previous.version, "rollback"), name)
    echo(f"rolled back: {name}@{alias} is {previous.reference} again, no longer {champion.reference}")
    return DONE


def _predecessor(champion: ModelVersion, moves: Mapping[int, Move]) -> int | None:
    """Whom the champion replaced when it was promoted: by the log or, in older registries, by its tag."""
    for number in sorted(moves, reverse=True):
        if moves[number].after == champion.version and moves[number].kind == "promotion":
            return moves[number].before
    tag = champion.tags.get(BEFORE_TAG, "")
    return int(tag) if tag.isascii() and tag.isdecimal() else None


def _already(champion: ModelVersion, back: Move | None, alias: str) -> str:
    """What a rollback that is done already says."""
    now = f"{champion.name}@{alias} is {champion.reference}"
    if back is None:
        return now
    return f"{now}, rolled back from {champion.name}/{back.before} at {_utc(back.at)}; further: --to VERSION"


def _note_rollback(move: Move, name: str) -> None:
    """Say so on the version that was taken out of office."""
    left = next((version for version in versions(name) if version.version == move.before), None)
    if left is not None:
        said = f"rolled back to {name}/{move.after} at {_utc(move.at)}"
        set_version_tags(left, {VERDICT_TAG: said})


def _utc(seconds: float) -> str:
    return f"{time.strftime('%F %T', time.gmtime(seconds))}Z"


def _sampled(version: ModelVersion, gate: GateConfig) -> FeatureSet:
    from pipeline.generate.model_source import find_model

    asked = SpecSettings(
        model=version.reference,
        count=gate.count,
        seed=gate.seed,
        sampler=gate.sampler,
        shard_size=gate.count,
        batch_size=min(gate.batch_size, gate.count),
    )
    return measure_model(find_model(version.reference), asked, gate.evaluate)

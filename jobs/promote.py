"""The registry's gate: `python -m jobs.promote digits`, and `python -m jobs.promote --rollback digits`.

A challenger becomes champion only when it passes. Every decision, with all its numbers, is kept on the challenger's
model version as tags; a promoted version remembers whom it replaced, which makes going back one command.
"""

import json
import sys
import time
from collections.abc import Sequence

from jobs.evaluate import measure_model
from jobs.progress import Progress
from jobs.shell import DONE, FAILED, Call, guarded, parse_words, run_job, use_running_stack
from pipeline.config.evaluate import GateConfig, PromoteConfig
from pipeline.config.generate import SpecSettings
from pipeline.data import load_index
from pipeline.errors import UserError
from pipeline.evaluate.gate import Decision, judge, table, verdict
from pipeline.evaluate.measured import Measured
from pipeline.evaluate.reference import reference
from pipeline.track import ModelVersion, resolve, set_alias, set_version_tags, versions

VERDICT_TAG = "ddpm.gate"
DECISION_TAG = "ddpm.gate.decision"
BEFORE_TAG = "ddpm.gate.before"
_TAG_LIMIT = 7500  # MLflow cuts tags at 8000 characters


def main(argv: Sequence[str] | None = None) -> int:
    """Settings in, exit code out: 0 promoted or nothing to do, 1 refused by the gate, 2 a mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--rollback"]:
        return guarded(lambda: rollback(words[1] if len(words) > 1 else ""))
    return guarded(lambda: run_call(parse_words("promote", words)))


def run_call(call: Call) -> int:
    """Run the job that a call describes."""
    return run_job("promote", PromoteConfig, lambda c, p: run(c, p, call.as_json), call, unit="models")


def run(config: PromoteConfig, progress: Progress, as_json: bool = False) -> int:
    """Compare, decide, and say so."""
    challenger = resolve(f"{config.model}@{config.challenger}")
    champion = champion_of(config.model, config.champion)
    if champion is not None and champion.version == challenger.version:
        print(f"nothing to do: {challenger.reference} is the champion already")
        return DONE
    decision = decide(config.gate, challenger, champion, progress)
    keep(decision, challenger, champion, config.champion)
    if as_json:
        print(json.dumps(decision.model_dump(mode="json"), indent=2))
    else:
        print("\n".join(table(decision)))
        print(f"{decision.verdict}: {decision.challenger}: {decision.reason}")
    return DONE if decision.verdict == "promoted" else FAILED


def after_training(gate: GateConfig, challenger: ModelVersion) -> str:
    """Run the gate on a model that was just registered; returns a line that says how it went.

    What keeps the gate from judging, such as a missing feature network, is said and fails no finished training.
    """
    champion = champion_of(challenger.name)
    if champion is not None and champion.version == challenger.version:
        return f"gate     {challenger.reference} is the champion already"
    try:
        decision = decide(gate, challenger, champion, lambda done, total, note="": None)
        keep(decision, challenger, champion, "champion")
    except UserError as error:
        return f"gate     not run: {error}; then: ddpm promote"
    return f"gate     {decision.verdict}: {decision.reason}"


def champion_of(name: str, alias: str = "champion") -> ModelVersion | None:
    """The version in office, or None."""
    return next((version for version in versions(name) if alias in version.aliases), None)


def decide(
    gate: GateConfig, challenger: ModelVersion, champion: ModelVersion | None, progress: Progress
) -> Decision:
    """Sample both models from the same noise, measure, judge. A first version has no one to beat."""
    index = load_index(gate.evaluate.reference)
    real = reference(index, gate.evaluate.network, gate.evaluate.batch_size)
    if champion is None:
        judgements, passes, reason = {}, True, "there was no champion"
    else:
        measured: list[Measured] = []
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
    """Write the decision onto the challenger's version; move the alias, last, if it passed."""
    text = json.dumps(decision.model_dump(mode="json", exclude_defaults=True), separators=(",", ":"))
    if len(text) > _TAG_LIMIT:
        raise UserError(
            f"gate.rules: the decision takes {len(text)} characters, a tag holds {_TAG_LIMIT}; ask less"
        )
    tags = {VERDICT_TAG: decision.verdict, DECISION_TAG: text}
    if decision.verdict == "promoted" and champion is not None:
        tags[BEFORE_TAG] = str(champion.version)
    set_version_tags(challenger, tags)
    if decision.verdict == "promoted":
        set_alias(challenger.name, alias, challenger.version)


def rollback(name: str, alias: str = "champion") -> int:
    """Put the champion's predecessor back into office."""
    if not name:
        raise UserError("rollback: name the registered model, for example: ddpm rollback digits")
    use_running_stack()
    champion = champion_of(name, alias)
    if champion is None:
        raise UserError(f"model {name!r}: has no {alias}; see its versions in the registry")
    before = champion.tags.get(BEFORE_TAG)
    if before is None:
        raise UserError(f"model {champion.reference}: replaced no one, so there is no version to go back to")
    previous = resolve(f"{name}/{before}")
    set_alias(name, alias, previous.version)
    set_version_tags(
        champion,
        {VERDICT_TAG: f"rolled back to {previous.reference} at {time.strftime('%F %T', time.gmtime())}Z"},
    )
    print(f"rolled back: {name}@{alias} is {previous.reference} again, no longer {champion.reference}")
    return DONE


def _sampled(version: ModelVersion, gate: GateConfig) -> Measured:
    from pipeline.generate.model import find_model

    asked = SpecSettings(
        model=version.reference,
        count=gate.count,
        seed=gate.seed,
        sampler=gate.sampler,
        shard_size=gate.count,
        batch_size=min(gate.batch_size, gate.count),
    )
    return measure_model(find_model(version.reference), asked, gate.evaluate)


if __name__ == "__main__":
    sys.exit(main())

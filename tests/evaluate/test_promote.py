"""Promotion and rollback on a registry in memory: concurrent, killed at any request, repeated."""

from functools import partial
from typing import Any, NoReturn

import pytest

import ddpm_pipeline.jobs.promote
from ddpm_pipeline.evaluate import promotion
from ddpm_pipeline.evaluate.promotion import read_champion, record
from ddpm_pipeline.jobs.promote import rollback
from ddpm_pipeline.jobs.runner import handle_errors
from ddpm_pipeline.tracking import ModelVersion, MoveConflictError, alias_log
from tests.evaluate.made import decision
from tests.track.one_model import Registry, Stepped
from tests.turns import Died


class Models(Registry):
    """Four versions of `digits`, each with its own tags."""

    def __init__(self, champion: int | None) -> None:
        super().__init__(champion)
        self.version_tags: dict[int, dict[str, str]] = {number: {} for number in range(1, 5)}

    def versions(self, name: str) -> list[ModelVersion]:
        return [
            ModelVersion(name, number, "", "", "", dict(tags)) for number, tags in self.version_tags.items()
        ]

    def resolve(self, reference: str) -> ModelVersion:
        name, _, number = reference.partition("/")
        return self.versions(name)[int(number) - 1]

    def set_version_tags(self, version: ModelVersion, tags: dict[str, str]) -> None:
        self.version_tags[version.version].update(tags)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    """Champion is version 2; nothing was decided by a log yet."""
    found = Models(2)
    connect(found, found, monkeypatch)
    monkeypatch.setattr(ddpm_pipeline.jobs.promote, "use_running_stack", lambda: None)
    return found


def connect(models: Models, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the job under test speak to `client`."""
    monkeypatch.setattr(alias_log, "tracking_client", lambda uri: client)
    for name in ("versions", "resolve", "set_version_tags"):
        ask = partial(_ask, client, name)
        monkeypatch.setattr(promotion, name, ask)


def _ask(client: Any, name: str, *args: object) -> Any:
    return getattr(client, name)(*args)  # looked up for each request: that is what a stepped client counts


def promoted(models: Models, challenger: int, champion: int | None, seen_number: int = 0) -> None:
    """A gate that began after move `seen_number` and let `challenger` pass against `champion` writes its decision."""
    seen = None if champion is None else models.resolve(f"digits/{champion}")
    made = decision(challenger, champion)
    record(made, models.resolve(f"digits/{challenger}"), seen, "champion", seen_number)


def test_a_challenger_compared_with_an_earlier_champion_is_not_promoted(models: Models) -> None:
    promoted(models, 3, 2)
    with pytest.raises(MoveConflictError, match="run it again"):
        promoted(models, 1, 2)
    assert models.aliases["champion"] == 3
    assert models.version_tags[1]["ddpm.gate"] == "not promoted: another decision came first"
    assert models.version_tags[3] | {"ddpm.gate.decision": ""} == {
        "ddpm.gate": "promoted",
        "ddpm.gate.before": "2",
        "ddpm.gate.decision": "",
    }


def test_one_promotion_by_two_jobs_is_one_move_and_both_say_promoted(models: Models) -> None:
    promoted(models, 3, 2)
    promoted(models, 3, 2)  # it began beside the first and took longer
    assert [(move.before, move.after) for move in alias_log.LoggedAlias("digits").read().moves.values()] == [
        (2, 3)
    ]
    assert models.version_tags[3]["ddpm.gate"] == "promoted"


def test_a_late_job_does_not_overwrite_the_tags_of_a_promoted_version(models: Models) -> None:
    promoted(models, 3, 2)
    promoted(models, 4, 3, seen_number=1)
    with pytest.raises(MoveConflictError, match="means version 4 by now"):
        promoted(models, 3, 2)
    assert models.version_tags[3]["ddpm.gate"] == "promoted"
    assert models.aliases["champion"] == 4


def test_a_late_promotion_does_not_undo_a_rollback(models: Models) -> None:
    promoted(models, 3, 2)
    alias_log.LoggedAlias("digits").move(3, 2, "rollback")
    with pytest.raises(MoveConflictError, match="moved away from version 2 and back"):
        promoted(models, 3, 2)
    assert models.aliases["champion"] == 2


def test_an_overtaken_promotion_exits_with_1_in_one_line(
    models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    promoted(models, 3, 2)
    assert handle_errors(lambda: promoted(models, 1, 2)) == 1  # type: ignore[arg-type, return-value, func-returns-value]
    assert capsys.readouterr().err.startswith("failed: digits@champion: means version 3 by now")


def test_a_promotion_killed_at_any_request_is_complete_or_has_no_effect(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dies_at in range(40):
        models = Models(2)
        connect(models, Stepped(models, None, 0, dies_at), monkeypatch)
        try:
            promoted(models, 3, 2)
            ended = True
        except Died:
            ended = False
        connect(models, models, monkeypatch)
        champion, _ = read_champion("digits", "champion")
        assert champion is not None
        if champion.version == 2:
            assert not ended
            promoted(models, 3, 2)
        else:
            promotion.tag_promotion(champion, "champion")
        assert models.aliases["champion"] == 3
        assert models.version_tags[3]["ddpm.gate"] == "promoted"
        assert models.version_tags[3]["ddpm.gate.before"] == "2"
        if ended:
            return
    raise AssertionError("the promotion never came to its end")


def test_a_rollback_killed_at_any_request_and_repeated_goes_back_once(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dies_at in range(40):
        models = Models(1)
        connect(models, models, monkeypatch)
        promoted(models, 2, 1)
        promoted(models, 3, 2, seen_number=1)
        connect(models, Stepped(models, None, 0, dies_at), monkeypatch)
        try:
            rollback("digits")
            ended = True
        except Died:
            ended = False
        connect(models, models, monkeypatch)
        for _ in range(2):
            assert rollback("digits") == 0
            assert models.aliases["champion"] == 2
            assert models.version_tags[3]["ddpm.gate"].startswith("rolled back to digits/2 at ")
        if ended:
            return
    raise AssertionError("the rollback never came to its end")


def test_a_repeated_rollback_does_nothing_and_says_how_to_go_further_back(
    models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    promoted(models, 3, 2)
    promoted(models, 4, 3, seen_number=1)
    assert rollback("digits") == 0
    assert "rolled back: digits@champion is digits/3 again, no longer digits/4" in capsys.readouterr().out
    assert rollback("digits") == 0
    printed = capsys.readouterr().out
    assert "nothing to do: digits@champion is digits/3, rolled back from digits/4 at " in printed
    assert "further: --to VERSION" in printed
    for _ in range(2):
        assert rollback("digits", to=2) == 0
        assert models.aliases["champion"] == 2


def test_a_rollback_after_a_promotion_returns_to_the_replaced_version(models: Models) -> None:
    promoted(models, 3, 2)
    assert rollback("digits") == 0
    promoted(models, 4, 2, seen_number=2)
    assert rollback("digits") == 0
    assert models.aliases["champion"] == 2


def test_a_registry_from_before_the_log_is_rolled_back_by_its_tag(
    models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    models.version_tags[2]["ddpm.gate.before"] = "1"
    assert rollback("digits") == 0
    assert models.aliases["champion"] == 1
    models.version_tags[2].clear()
    models.aliases["champion"] = 3  # by hand
    assert handle_errors(lambda: rollback("digits")) == 2
    assert "replaced no version" in capsys.readouterr().err


def test_a_rollback_of_an_unknown_model_is_refused_in_one_line(
    models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def get_registered_model(name: str) -> NoReturn:
        raise LookupError(f"{name}: MLflow has no such model")

    monkeypatch.setattr(models, "versions", lambda name: [])
    monkeypatch.setattr(models, "get_registered_model", get_registered_model)
    assert handle_errors(lambda: rollback("nosuch")) == 2
    assert "model 'nosuch': has no champion" in capsys.readouterr().err

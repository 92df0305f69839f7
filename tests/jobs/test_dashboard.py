"""Which dashboard is meant, where Ray's variables and ours may contradict each other."""

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.cluster_address import dashboard_address, settle_address, settle_token

OURS = "http://ray.example:8265"


@pytest.mark.parametrize(
    "environ",
    [
        {"RAY_JOB_ADDRESS": OURS},
        {"RAY_JOB_ADDRESS": OURS + "/"},
        {"RAY_API_SERVER_ADDRESS": OURS},
        {"RAY_ADDRESS": OURS},
        {"RAY_JOB_ADDRESS": OURS, "RAY_ADDRESS": "10.77.0.2:6379"},
        {"RAY_JOB_ADDRESS": OURS, "RAY_API_SERVER_ADDRESS": OURS},
    ],
)
def test_the_address_that_is_meant_is_the_one_that_ray_uses(
    environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    driver = environ.get("RAY_ADDRESS")
    settle_address(environ)
    # Ray's client obeys this variable before its own argument and before RAY_ADDRESS
    assert (
        environ["RAY_API_SERVER_ADDRESS"] == environ["RAY_JOB_ADDRESS"] == dashboard_address(environ) == OURS
    )
    assert environ.get("RAY_ADDRESS") == driver
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("other", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_a_contradiction_is_said_and_ours_is_obeyed(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"RAY_JOB_ADDRESS": OURS, other: "http://user:canary-word@other.example:8265"}
    settle_address(environ)
    assert environ["RAY_API_SERVER_ADDRESS"] == OURS
    said = capsys.readouterr().err
    assert said.startswith(f"note     RAY_JOB_ADDRESS {OURS} is used; {other} names http://")
    assert "canary-word" not in said


def test_no_address_and_a_drivers_own_name_no_dashboard() -> None:
    for environ in ({}, {"RAY_ADDRESS": "10.77.0.2:6379"}, {"RAY_ADDRESS": "ray://10.77.0.2:10001"}):
        before = dict(environ)
        settle_address(environ)
        assert environ == before
        assert dashboard_address(environ) is None


def test_an_address_without_a_scheme_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^RAY_JOB_ADDRESS ray\.example:8265: .*http://ray\.example:8265$"):
        settle_address({"RAY_JOB_ADDRESS": "ray.example:8265"})


def test_a_token_that_is_given_is_used() -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        environ = {name: "x"}
        settle_token(environ)
        assert environ["RAY_AUTH_MODE"] == "token"
    own = {"RAY_AUTH_TOKEN": "x", "RAY_AUTH_MODE": "disabled"}
    settle_token(own)
    assert own["RAY_AUTH_MODE"] == "disabled"
    nothing: dict[str, str] = {}
    settle_token(nothing)
    assert nothing == {}

"""`--cluster`: a name or an address points a command at a cluster, and away from the local stack."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.cli import app
from ddpm_pipeline.jobs.cluster_address import use_cluster

FILE = """
work:
  address: https://ray.example:8265
  token_path: ~/work-token
  variables: {DDPM_ROOT: "s3://team/ddpm"}
bad: {adress: "https://ray.example"}
leaky: {address: "https://ray.example", variables: {AWS_SECRET_ACCESS_KEY: 0123456789abcdef}}
"""


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clusters.yaml").write_text(FILE)
    return {"DDPM_CLUSTERS": str(tmp_path / "clusters.yaml"), "RAY_AUTH_TOKEN": "another"}


def test_a_name_brings_address_token_and_services(environ: dict[str, str]) -> None:
    use_cluster("work", environ)
    assert environ["RAY_JOB_ADDRESS"] == environ["RAY_API_SERVER_ADDRESS"] == "https://ray.example:8265"
    assert environ["RAY_AUTH_MODE"] == "token"
    assert environ["RAY_AUTH_TOKEN_PATH"] == str(Path("~/work-token").expanduser())
    assert "RAY_AUTH_TOKEN" not in environ
    assert environ["DDPM_ROOT"] == "s3://team/ddpm"


def test_an_address_keeps_the_token_that_is_there_and_nothing_changes_nothing(
    environ: dict[str, str],
) -> None:
    before = dict(environ)
    use_cluster(None, environ)
    assert environ == before
    use_cluster("http://127.0.0.1:9", environ)
    assert environ["RAY_JOB_ADDRESS"] == "http://127.0.0.1:9"
    assert environ["RAY_AUTH_TOKEN"] == "another"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wrok", "did you mean 'work'?"),
        ("zzz", "known are work, bad, leaky"),
        ("bad", "bad.address: field required"),
        ("leaky", "leaky.variables: holds a secret"),
    ],
)
def test_a_wrong_name_or_entry_is_refused_in_one_line(environ: dict[str, str], name: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        use_cluster(name, environ)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "0123456789abcdef" not in str(caught.value)


def test_commands_take_it(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_CLUSTERS", environ["DDPM_CLUSTERS"])
    for words in (["submit", "train", "digits"], ["jobs"], ["logs", "x"], ["stop", "x"]):
        result = CliRunner().invoke(app, [*words, "--cluster", "wrok"])
        assert result.exit_code == 2
        assert "did you mean 'work'?" in result.stderr

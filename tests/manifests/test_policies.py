"""The bucket policies, enforced by moto's IAM on the calls that the store really makes."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import boto3
import pytest
from moto import mock_aws
from moto.core import set_initial_no_auth_action_count

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import open_store

POLICIES = Path(__file__).resolve().parents[2] / "infra" / "policies"
DATA, FEATURES, RUNS = "data/digits", "data/digits/features", "runs/digits-1"
SAMPLES, NIGHT, TUNING = "samples/digits", "nightly/digits/2026-01-31", "tuning/digits"
PLACES = (DATA, FEATURES, RUNS, SAMPLES, NIGHT, TUNING)
READS = {
    "packer": {DATA, FEATURES},
    "trainer": {DATA, FEATURES, RUNS},
    "generator": {FEATURES, SAMPLES},
    "evaluator": {DATA, FEATURES, SAMPLES, NIGHT, TUNING},
    "nightly": {DATA, FEATURES, NIGHT},
    "viewer": {SAMPLES, NIGHT},
    "ray": set(PLACES),
}
WRITES = {
    "packer": {DATA, FEATURES},
    "trainer": {RUNS},
    "generator": {SAMPLES},
    "evaluator": {FEATURES, TUNING},
    "nightly": {FEATURES, NIGHT},
    "viewer": set[str](),
    "ray": set(PLACES),
}


def allows_only_s3_of(bucket: str, policy: object) -> bool:
    text = json.dumps(policy)
    return set(re.findall(r"arn:aws:s3:::([a-z]+)", text)) == {bucket} and "s3:*" not in text


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An AWS of its own, with the bucket and an object in each place."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "owner")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "owner")
    with mock_aws():
        boto3.client("s3").create_bucket(Bucket="ddpm")
        for place in PLACES:
            open_store(f"s3://ddpm/{place}").write("object", b"content")
        yield monkeypatch


def become(role: str, aws: pytest.MonkeyPatch) -> None:
    """From here on this process has the rights of a role and no others."""
    iam = boto3.client("iam")
    iam.create_user(UserName=role)
    policy = (POLICIES / f"{role}.json").read_text()
    iam.put_user_policy(UserName=role, PolicyName="s3", PolicyDocument=policy)
    key = iam.create_access_key(UserName=role)["AccessKey"]
    aws.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    aws.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])


def refuses(action: Callable[[], object]) -> bool:
    try:
        action()
    except UserError as error:
        if "refuses the keys" not in str(error):
            raise
        return True
    return False


@pytest.mark.parametrize("role", READS)
@set_initial_no_auth_action_count(3)  # those that make the role; every later call is judged
def test_a_role_reads_and_writes_where_it_must_and_nowhere_else(
    role: str, aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(role, aws)
    aws.setattr("ddpm_pipeline.store.s3_store.PART_BYTES", 5 << 20)  # S3's least
    large = tmp_path / "large"
    large.write_bytes(bytes((5 << 20) + 1))  # goes up in parts
    for place in PLACES:
        store = open_store(f"s3://ddpm/{place}")
        store.require_container()
        assert "object" in [info.key for info in store.list()], f"{role} lists {place}"
        reads, writes = place in READS[role], place in WRITES[role]
        for read in (
            partial(store.read, "object"),
            partial(store.read_range, "object", 0, 3),
            partial(store.stat, "object"),
            partial(store.download, "object", tmp_path / "there"),
        ):
            assert refuses(read) is not reads, f"{role} in {place}"
        for write in (
            partial(store.write, "other", b"new"),
            partial(store.upload, "large", large),
            partial(store.delete, "other"),
            partial(store.delete, "large"),
        ):
            assert refuses(write) is not writes, f"{role} in {place}"


@set_initial_no_auth_action_count(3)
def test_an_evaluator_writes_figures_beside_samples_and_no_sample(aws: pytest.MonkeyPatch) -> None:
    become("evaluator", aws)
    samples = open_store("s3://ddpm/samples")
    samples.write("digits.evaluation.json", b"{}")
    samples.write("digits.neighbours.png", b"drawn")
    assert refuses(partial(samples.write, "digits/shards/000000.tar", b"forged"))
    assert refuses(partial(samples.delete, "digits/object"))


@pytest.mark.parametrize("role", READS)
def test_a_role_speaks_of_its_bucket_only_and_has_no_right_over_the_bucket_itself(role: str) -> None:
    policy = json.loads((POLICIES / f"{role}.json").read_text())
    assert allows_only_s3_of("ddpm", policy)
    actions = {action for statement in policy["Statement"] for action in statement["Action"]}
    known = {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"}
    assert actions <= known
    for statement in policy["Statement"]:
        whole_bucket = statement["Resource"] == ["arn:aws:s3:::ddpm"]
        assert (statement["Action"] == ["s3:ListBucket"]) is whole_bucket
        assert all(
            re.fullmatch(r"arn:aws:s3:::ddpm(/[a-z]+/[a-z*/.]+)?", arn) for arn in statement["Resource"]
        )


def test_the_mlflow_server_has_its_own_bucket_and_no_other() -> None:
    assert allows_only_s3_of("mlflow", json.loads((POLICIES / "mlflow.json").read_text()))


def test_the_bucket_refuses_requests_without_tls() -> None:
    (statement,) = json.loads((POLICIES / "bucket.json").read_text())["Statement"]
    assert statement["Effect"] == "Deny"
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}

"""Secrets do not leave, and what only looks like one is left alone."""

import re

import pytest

from ddpm_pipeline.telemetry.redaction import MASK, redact, secret_values

AWS_ID = "AKIA" + "ABCDEFGHIJKLMNOP"


@pytest.mark.parametrize(
    "text",
    [
        "password: correct-horse",
        "aws_secret_access_key=correct-horse/battery+staple",
        '{"api_key": "correct-horse"}',
        "postgresql://someone:correct-horse@db.example/mlflow",
        "http://:correct-horse@host/",
        "http://user:correct/horse@host:8265/",
        "http://user:correct@horse@host/x",
        "http://user:12345@correct-horse@host",
        "https://host/api?token=correct-horse&x=1",
        "https://bucket.s3.amazonaws.com/key?X-Amz-Signature=correct-horse",
        "https://bucket.s3.amazonaws.com/key?AWSAccessKeyId=correct-horse&Signature=correct-horse",
        "https://host/x?X-Amz-Credential=correct-horse%2F20260101&X-Amz-Security-Token=correct-horse",
        "https://account.blob.example/x?sv=1&sig=correct-horse",
        "Authorization: Bearer correct-horse-battery",
        "--token=correct-horse",
        "-----BEGIN RSA PRIVATE KEY-----\ncorrect-horse\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_a_secret_inside_text_is_masked(text: str) -> None:
    assert not {"correct", "horse"} & set(re.split(r"\W", redact(text)))
    assert MASK in redact(text)


def test_an_aws_key_id_is_masked() -> None:
    assert AWS_ID not in redact(f"key {AWS_ID} used")


def test_secrets_are_masked_at_any_depth_and_under_any_spelling() -> None:
    config = {
        "store": {"AWS_SECRET_ACCESS_KEY": "abcdefgh", "uri": "s3://bucket/x"},
        "servers": [{"password": "abcdefgh"}, {"url": "https://u:abcdefgh@h/"}],
        "auth-token": "abcdefgh",
    }
    clean = redact(config)
    assert "abcdefgh" not in repr(clean)
    assert clean["store"]["uri"] == "s3://bucket/x"


@pytest.mark.parametrize(
    "text",
    [
        "num_tokens: 128",
        "s3://bucket/prefix@2",
        "http://127.0.0.1:5000/#/models/digits@champion",
        "http://127.0.0.1:5000?x=a@b",
        "http://[::1]:80/x@y",
        "model: digits@champion",
        "key: train/digits-12ab",
        "![s](get-artifact?path=figures/final.png&run_uuid=0123456789abcdef)",
        "password: null",
        "2026-11-22T10:11:12",
    ],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_ordinary_settings_stay_as_they_are() -> None:
    config = {
        "key": "train/digits",
        "tokens": 12,
        "seed": 7,
        "nested": {"path": "a/b", "on": True, "none": None},
    }
    assert redact(config) == config


def test_the_value_of_a_secret_variable_is_masked_wherever_it_appears(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "zebra-crossing")
    assert redact({"note": "I typed zebra-crossing here"}) == {"note": f"I typed {MASK} here"}


def test_short_values_are_not_hunted_for() -> None:
    assert secret_values({"PASSWORD": "abc", "API_TOKEN": "abcdefgh12", "HOME": "/home/someone"}) == (
        "abcdefgh12",
    )

"""What is particular to S3: buckets, keys, parts."""

from pathlib import Path

import boto3
import pytest

from infra.local import LocalStack
from pipeline.errors import UserError
from pipeline.store import StoreUnreachable, open_store
from pipeline.store.s3 import S3Store


def test_a_missing_bucket_is_named_with_the_command_that_makes_it(moto: str) -> None:
    with pytest.raises(
        UserError, match=r"s3://no-such-bucket/prefix: there is no bucket.*aws s3 mb s3://no-such-bucket"
    ):
        open_store("s3://no-such-bucket/prefix").require_container()
    with pytest.raises(UserError, match="there is no bucket"):
        open_store("s3://no-such-bucket").write("x", b"")
    open_store("s3://now-there-is").create_container()
    open_store("s3://now-there-is").require_container()


def test_an_upload_that_fails_leaves_no_parts_behind(
    moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "big").write_bytes(bytes(40 << 20))
    store = S3Store(moto)
    client = store._client
    real, sent = client.upload_part, []

    def failing(**arguments: object) -> object:
        sent.append(arguments["PartNumber"])
        if len(sent) == 2:
            raise KeyboardInterrupt
        return real(**arguments)

    monkeypatch.setattr(client, "upload_part", failing)
    with pytest.raises(KeyboardInterrupt):
        store.upload("big", tmp_path / "big")
    assert sent == [1, 2]
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket=moto)
    assert store.stat("big") is None


def test_more_objects_than_a_page_are_all_listed(moto: str) -> None:
    store = open_store(f"s3://{moto}")
    client = boto3.client("s3")
    for number in range(1005):
        client.put_object(Bucket=moto, Key=f"{number:05d}", Body=b"")
    keys = [info.key for info in store.list()]
    assert keys == [f"{number:05d}" for number in range(1005)]
    assert next(iter(store.list(start_after="01000"))).key == "01001"


@pytest.mark.stack
@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_SECRET_ACCESS_KEY", "wrong-secret-word"), ("AWS_ACCESS_KEY_ID", "nobody-at-all")],
)
def test_wrong_keys_are_refused_in_one_line_that_does_not_show_them(
    stack: LocalStack, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=r"refuses the keys \((SignatureDoesNotMatch|InvalidAccessKeyId)\)"
    ) as caught:
        open_store("s3://ddpm").require_container()
    assert not isinstance(caught.value, StoreUnreachable)
    assert value not in str(caught.value)

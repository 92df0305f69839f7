"""What is particular to S3: buckets, keys, parts."""

import threading
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import boto3
import botocore.response
import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.store import ObjectMissing, RetryPolicy, StoreUnreachable, open_store
from ddpm_pipeline.store.s3_store import S3Store
from tests.effort import is_long


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


def test_an_upload_whose_last_answer_was_lost_is_done(
    moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "big").write_bytes(bytes(20 << 20))
    store = S3Store(moto, policy=RetryPolicy(first_pause_seconds=0.001))
    client = store._client
    real, asked = client.complete_multipart_upload, []

    def unheard(**arguments: object) -> object:
        asked.append(arguments)
        answer = real(**arguments)
        if len(asked) == 1:
            raise ConnectionResetError
        return answer

    monkeypatch.setattr(client, "complete_multipart_upload", unheard)
    assert store.upload("big", tmp_path / "big") == store.stat("big")
    assert len(asked) == 2


def test_more_objects_than_a_page_are_all_listed(moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "20")  # 1,000 by default, as S3 has it
    store = open_store(f"s3://{moto}")
    client = boto3.client("s3")
    for number in range(45):
        client.put_object(Bucket=moto, Key=f"{number:05d}", Body=b"")
    assert client.list_objects_v2(Bucket=moto)["KeyCount"] == 20
    keys = [info.key for info in store.list()]
    assert keys == [f"{number:05d}" for number in range(45)]
    assert next(iter(store.list(start_after="00040"))).key == "00041"


def test_half_of_one_version_and_half_of_another_is_read_again_and_other_tags_are_believed(
    moto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Store(moto, policy=RetryPolicy(first_pause_seconds=0.001))
    store.write("x", b"as it is")
    real, bodies, asked = store._client.get_object, list[bytes](), list[object]()

    def answers(*given: bytes) -> None:
        bodies[:] = given
        asked.clear()

    def get(**arguments: object) -> object:
        asked.append(arguments)
        found = real(**arguments)
        body = bodies.pop(0)
        return found | {"Body": botocore.response.StreamingBody(BytesIO(body), len(body))}

    monkeypatch.setattr(store._client, "get_object", get)
    answers(b"as it we", b"as it is")
    assert store.read("x") == b"as it is"
    assert len(asked) == 2
    answers(b"sealed..", b"sealed..")  # a store that encrypts gives tags that are no digests
    assert store.read("x") == b"sealed.."
    answers(*(f"{number:08d}".encode() for number in range(8)))
    with pytest.raises(
        StoreUnreachable, match="x: replaced during every attempt to read it; try again later"
    ):
        store.read("x")


@pytest.mark.stack
def test_a_reader_of_an_object_that_is_replaced_all_the_time_sees_whole_versions_only(prefix: str) -> None:
    store, ended = open_store(prefix), threading.Event()
    version = lambda number: b"%d " % number * (1 + number % 97)  # noqa: E731 - of many lengths
    store.write("x", version(0))

    def replace() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            store.write("x", version(number))

    writer = threading.Thread(target=replace)
    writer.start()
    seen = set[int]()
    try:
        for _ in range(400 if is_long() else 150):
            with suppress(ObjectMissing):  # the local gateway says so for a moment
                data = store.read("x")
                seen.add(int(data.split()[0]))
                assert data == version(max(seen))
    finally:
        ended.set()
        writer.join()
    assert len(seen) > 10


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

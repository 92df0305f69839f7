"""What S3 is told of the kind of an object."""

from typing import Any

import boto3

from ddpm_pipeline.store.s3_store import S3Store


def test_a_browser_is_told_what_a_page_and_an_image_are(moto: str) -> None:
    client: Any = boto3.client("s3")  # pyright: ignore[reportUnknownMemberType]
    store, told = S3Store(moto), dict[str, str]()
    for key in ("index.html", "pages/a.b.png", "0.webp", "spec.json", "0.tar"):
        store.write(key, b"<html>")
        assert store.read(key) == b"<html>"
        told[key] = client.head_object(Bucket=moto, Key=key)["ContentType"]
    assert told == {
        "index.html": "text/html; charset=utf-8",
        "pages/a.b.png": "image/png",
        "0.webp": "image/webp",
        "spec.json": "application/json",
        "0.tar": "binary/octet-stream",
    }

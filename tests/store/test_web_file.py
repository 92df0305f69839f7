"""Files on the web are read over broken connections, in one version, and from where they were said to be."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.retry import RetryPolicy
from ddpm_pipeline.store import ObjectChanged, StoreUnreachable
from ddpm_pipeline.store.web_file import WebFile, without_secrets
from tests.data.web_server import Site, serving

DATA = bytes(range(256)) * 1000
QUICK = RetryPolicy(attempts=3, first_pause_seconds=0.001)


@pytest.fixture
def site() -> Site:
    return Site({"/x.zip": DATA, "/a folder/ü.tar": b"tar"})


@pytest.fixture
def address(site: Site) -> Iterator[str]:
    with serving(site) as url:
        yield url


def test_a_file_is_read_as_it_is(address: str) -> None:
    file = WebFile(f"{address}/x.zip")
    info = file.stat()
    assert (info.size_bytes, info.names[0]) == (len(DATA), "x.zip")
    with file.open(0, info) as stream:
        assert stream.read(-1) == DATA
    with file.open(len(DATA) - 10, info) as stream:
        assert stream.read(-1) == DATA[-10:]
    with file.open(len(DATA), info) as stream:
        assert stream.read(-1) == b""


def test_a_connection_that_is_cut_again_and_again_is_resumed_at_the_byte(site: Site, address: str) -> None:
    site.cut = lambda size: max(1, size // 2)
    file = WebFile(f"{address}/x.zip", policy=QUICK)
    with file.open(0, file.stat()) as stream:
        assert stream.read(-1) == DATA
    starts = [int(range_[6:-1]) for _, range_ in site.requests if range_]
    assert len(starts) > 5
    assert starts == sorted(set(starts))


def test_a_busy_server_is_asked_again_and_a_dead_one_is_named(site: Site, address: str) -> None:
    site.busy = 1
    assert WebFile(f"{address}/x.zip").stat().size_bytes == len(DATA)
    site.busy = 9
    with pytest.raises(StoreUnreachable, match=r"/x\.zip: the server answers 503; try again later"):
        WebFile(f"{address}/x.zip").stat()
    with pytest.raises(StoreUnreachable, match=r"cannot be reached, .* check the address and the network"):
        WebFile("http://127.0.0.1:9/x.zip").stat()


def test_a_file_that_is_replaced_while_it_is_read_is_noticed(site: Site, address: str) -> None:
    file = WebFile(f"{address}/x.zip", policy=QUICK)
    info = file.stat()
    site.files["/x.zip"] = DATA[::-1] + b"more"
    for start in (0, 10):
        with pytest.raises(ObjectChanged, match="replaced"):
            file.open(start, info)


def test_a_server_that_sends_no_parts_cannot_resume(site: Site, address: str) -> None:
    site.sends_ranges = False
    file = WebFile(f"{address}/x.zip", policy=QUICK)
    info = file.stat()
    with file.open(0, info) as stream:
        assert stream.read(-1) == DATA
    with pytest.raises(ObjectChanged, match="cannot be resumed"):
        file.open(10, info)


@pytest.mark.parametrize("whole", [True, False])
def test_a_file_of_unknown_size_is_read_whole_or_not_at_all(site: Site, address: str, whole: bool) -> None:
    site.sends_size = False
    site.cut = lambda size: size if whole else size - 1
    file = WebFile(f"{address}/x.zip", policy=QUICK)
    info = file.stat()
    assert info.size_bytes is None
    with file.open(0, info) as stream:
        if whole:
            assert stream.read(-1) == DATA
        else:
            with pytest.raises(StoreUnreachable, match="stopped answering"):
                stream.read(-1)


@pytest.mark.parametrize(
    ("path", "headers", "complaint"),
    [
        ("/y.zip", {}, r"/y\.zip: the server answers 404; there is no such file"),
        ("/x.zip", {"Content-Type": "text/html; charset=utf-8"}, "answers with a web page, not a file"),
    ],
)
def test_what_is_no_file_is_refused(
    site: Site, address: str, path: str, headers: dict[str, str], complaint: str
) -> None:
    site.headers = headers
    with pytest.raises(UserError, match=complaint):
        WebFile(address + path).stat()


def test_redirects_are_followed_on_the_same_host_and_give_a_name(site: Site, address: str) -> None:
    site.redirects = {"/download": "/a%20folder/%C3%BC.tar"}
    info = WebFile(f"{address}/download?id=3").stat()
    assert (info.size_bytes, info.names) == (3, ("download", "ü.tar"))
    site.redirects = {"/a": "/b", "/b": "/a"}
    with pytest.raises(UserError, match="redirects more than 5 times"):
        WebFile(f"{address}/a").stat()


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ("file:///etc/passwd", "leads to the scheme 'file'; only http and https are followed"),
        ("ftp://example.org/x.zip", "leads to the scheme 'ftp'"),
        ("http://localhost:{port}/x.zip", "redirects to localhost, which has a private address"),
        ("http://127.1.2.3:{port}/x.zip", r"redirects to 127\.1\.2\.3, which has a private address"),
        ("http://169.254.169.254/latest/meta-data/", r"redirects to 169\.254\.169\.254, which has a private"),
        ("http://10.0.0.1/x.zip", "has a private address"),
        ("http://[::1]:{port}/x.zip", "has a private address"),
        ("http://[::ffff:10.0.0.1]/x.zip", "has a private address"),
        ("http://[fe80::1]/x.zip", "has a private address"),
        ("http://a:b:c/", "not an address"),
    ],
)
def test_redirects_to_other_schemes_and_to_private_hosts_are_refused_unasked(
    site: Site, address: str, place: str, complaint: str
) -> None:
    site.redirects = {"/x": place.format(port=address.rpartition(":")[2])}
    with pytest.raises(UserError, match=complaint):
        WebFile(f"{address}/x").stat()
    assert [path for path, _ in site.requests] == ["/x"]


def test_a_redirect_from_https_to_http_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(session: requests.Session, url: str, **_: Any) -> requests.Response:
        response = requests.Response()
        response.status_code, response.url, response.raw = 302, url, io.BytesIO()
        response.headers["Location"] = "http://example.org/x.zip"
        return response

    monkeypatch.setattr(requests.Session, "get", get)
    with pytest.raises(UserError, match=r"redirects from https to http \(example\.org\)"):
        WebFile("https://example.org/x.zip").stat()


def test_credentials_in_an_address_are_sent_and_never_told(site: Site, address: str) -> None:
    url = address.replace("http://", "http://user:secret@") + "/gone.zip?signature=secret#secret"
    with pytest.raises(UserError, match="404") as refusal:
        WebFile(url).stat()
    assert "secret" not in str(refusal.value)
    assert site.seen_headers[0]["Authorization"].startswith("Basic ")
    assert without_secrets(url) == f"{address}/gone.zip"
    unreachable = WebFile("http://user:secret@127.0.0.1:9/x.zip?key=secret", policy=QUICK)
    with pytest.raises(StoreUnreachable) as outage:
        unreachable.stat()
    assert "secret" not in str(outage.value)


def test_credentials_stay_with_their_host(site: Site, address: str) -> None:
    other = Site({"/x.zip": b"data"})
    with serving(other) as elsewhere:
        site.redirects = {"/x.zip": f"{elsewhere}/x.zip"}
        WebFile(address.replace("http://", "http://user:secret@") + "/x.zip").stat()
    assert "Authorization" in site.seen_headers[0]
    assert "Authorization" not in other.seen_headers[0]

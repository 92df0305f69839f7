"""A server that plays a Hugging Face hub with one data set: the calls that huggingface_hub's file system makes."""

import hashlib
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import PurePosixPath
from urllib.parse import unquote

from tests.loopback_server import running

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A data set and who may see it."""

    name: str
    files: dict[str, bytes]
    gated: bool = False
    token: str | None = None
    """The one that opens a gated data set."""
    lies_about_hashes: bool = False
    fetched: list[str] = field(default_factory=list)
    """Paths of the files that were asked for, with the first byte of each range."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(self.path.partition("?")[0])
        api, files = f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/{COMMIT}/"
        allowed = not hub.gated or self.headers.get("Authorization") == f"Bearer {hub.token}"
        if path.startswith(("/api/datasets/", "/datasets/")) and not path.startswith((api, files)):
            self._answer(404, {"X-Error-Code": "RepoNotFound"}, b"")
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self._answer(200, {}, json.dumps({"id": hub.name, "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"{api}/revision/"):
            self._answer(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        elif not allowed:
            self._answer(403, {"X-Error-Code": "GatedRepo"}, b"")
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            below = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
            self._answer(
                200, {}, json.dumps(self._tree(below, "recursive=true" in self.path.lower())).encode()
            )
        elif (name := path.removeprefix(files)) in hub.files:
            self._send(name)
        else:
            self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"")

    def _tree(self, below: str, recursive: bool) -> list[dict[str, object]]:
        entries: dict[str, dict[str, object]] = {}
        for name, data in self.hub.files.items():
            if below and not name.startswith(f"{below}/"):
                continue
            parents = [str(parent) for parent in PurePosixPath(name).parents][:-1]
            for folder in parents:
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entries[name] = {"type": "file", "path": name, "oid": blob, "size": len(data)}
            if not name.endswith(".md"):
                oid = "0" * 64 if self.hub.lies_about_hashes else hashlib.sha256(data).hexdigest()
                entries[name]["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
        depth = len(PurePosixPath(below).parts) + 1
        return [
            entry for path, entry in entries.items() if recursive or len(PurePosixPath(path).parts) == depth
        ]

    def _send(self, name: str) -> None:
        data = self.hub.files[name]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(wanted[1]), int(wanted[2]) + 1) if wanted else (0, len(data))
        self.hub.fetched.append(f"{name}@{start}")
        part = {"Content-Range": f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"} if wanted else {}
        self._answer(206 if wanted else 200, part, data[start:stop])

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def serving(hub: Hub) -> Generator[str]:
    """The address of the running hub."""
    with running(type("Handler", (_Handler,), {"hub": hub})) as address:
        yield address

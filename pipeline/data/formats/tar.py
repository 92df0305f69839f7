"""A strict tar reader.

Python's `tarfile` stops silently at a damaged header or a truncated file and loses the rest of a shard (CPython issue
120740). Here a tar is intact only if every header's checksum matches, every payload is complete, two zero blocks follow
the last member, and only zeros follow those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from ddpm_pipeline.errors import DamageError

BLOCK = 512
MAX_MEMBER_BYTES = 1 << 30  # one sample's file; more is damage or an attack
MAX_NAME_BYTES = 4096
MAX_DIGITS = 20  # of a number in an extended header; Python refuses to read one of thousands
_ZERO = bytes(BLOCK)
_REGULAR, _DIRECTORY = (b"0", b"\0", b"7"), b"5"
_REFUSED_KINDS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"6": "pipe",
    b"S": "sparse",
}
_WITHOUT_PAYLOAD = (b"1", b"2", b"3", b"4", _DIRECTORY, b"6")
_ENTRY_KINDS: dict[bytes, Literal["file", "hard link", "symbolic link", "other"]] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "hard link",
    b"2": "symbolic link",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its name, and the offset of its payload in the (decompressed) tar."""

    name: str
    offset: int
    size_bytes: int


class Reader(Protocol):
    """Anything read forward: `read(n)` returns n bytes, fewer only at the end."""

    def read(self, size: int, /) -> bytes: ...


class SeekableReader(Reader, Protocol):
    """A reader that can also seek, as files can."""

    def seek(self, offset: int, whence: int = 0, /) -> int: ...


def read_members(stream: Reader, label: str) -> Iterator[tuple[Member, bytes]]:
    """Regular files of a tar, in order, with their bytes. `label` names the tar in errors.

    Raises DamageError, naming the offset, for anything but an intact and safe tar: also for links, devices, and names
    that are absolute or contain '..'.
    """
    reader = _BlockReader(stream, label)
    for head in _headers(reader, "strict"):
        _refuse_unsafe(head, label)
        if head.kind == _DIRECTORY:
            continue
        offset = reader.position
        yield Member(head.name, offset, head.size), reader.payload(head.size, f"member {head.name!r}")


@dataclass(frozen=True, slots=True)
class TarEntry:
    """An entry of a tar: a file with the offset of its payload, or a link with its target."""

    name: str
    offset: int
    size_bytes: int
    kind: Literal["file", "hard link", "symbolic link", "other"]
    target: str = ""


def list_members(stream: SeekableReader, label: str) -> Iterator[TarEntry]:
    """The entries of a tar, without reading payloads: files, links, and `other` for devices and the like.

    Names may be anything, with undecodable bytes escaped; nothing is extracted under them. Raises DamageError, naming
    the offset, when headers are damaged or the tar is truncated.
    """
    reader = _BlockReader(stream, label)
    for head in _headers(reader, "backslashreplace"):
        offset, kind = reader.position, _ENTRY_KINDS.get(head.kind, "other")
        if head.kind not in _WITHOUT_PAYLOAD:
            reader.skip(head.size, f"member {head.name!r}", stream)
        if head.kind not in (_DIRECTORY, b"V"):
            yield TarEntry(head.name, offset, head.size, kind, head.target)


@dataclass(frozen=True, slots=True)
class _Header:
    name: str
    kind: bytes
    size: int
    start: int
    target: str


def _headers(reader: _BlockReader, names: str) -> Iterator[_Header]:
    """The header of each member; the caller consumes the payload before the next. `names`: how to decode names."""
    label = reader.label
    long: dict[bytes, str] = {}
    pax: dict[str, str] = {}
    while True:
        start = reader.position
        header = reader.take(BLOCK, "a header")
        if header == _ZERO:
            reader.require_end()
            return
        size, kind = _checked_size(header, label, start), header[156:157]
        if kind in (b"L", b"K", b"x", b"g"):
            if size > 1 << 20:
                raise DamageError(
                    f"{label}: at byte {start}: an extended header of {size} bytes is not accepted"
                )
            body = reader.payload(size, "an extended header")
            if kind in (b"L", b"K"):
                long[kind] = _text(body.rstrip(b"\0"), label, start, names)
            elif kind == b"x":
                pax = _pax_records(body, label, start, names)
            continue
        name = pax.get("path") or long.get(b"L") or _header_name(header, label, start, names)
        target = pax.get("linkpath") or long.get(b"K") or _link_name(header, label, start, names)
        yield _Header(name, kind, _pax_size(pax, size, label, start), start, target)
        long, pax = {}, {}


class _BlockReader:
    """Exact reads that track the position."""

    def __init__(self, stream: Reader, label: str) -> None:
        self.stream, self.label, self.position = stream, label, 0

    def take(self, count: int, what: str) -> bytes:
        data = self.stream.read(count)
        if len(data) != count:
            raise DamageError(
                f"{self.label}: ends at byte {self.position + len(data)}, in {what}: it is truncated"
            )
        self.position += count
        return data

    def payload(self, size: int, what: str) -> bytes:
        data = self.take(size, what)
        self.take(-size % BLOCK, f"the padding of {what}")
        return data

    def skip(self, size: int, what: str, stream: SeekableReader) -> None:
        """Skip a payload and its padding; its last byte is read to detect truncation."""
        padded = size + -size % BLOCK
        if padded:
            stream.seek(padded - 1, 1)
            if len(stream.read(1)) != 1:
                raise DamageError(
                    f"{self.label}: ends in {what}, which starts at byte {self.position}: it is truncated"
                )
        self.position += padded

    def require_end(self) -> None:
        """After one zero block: require another, then zeros up to the end of the file."""
        start = self.position
        if self.take(BLOCK, "the second end block") != _ZERO:
            raise DamageError(f"{self.label}: at byte {start}: data after a zero block: a header was erased")
        while rest := self.stream.read(1 << 16):
            if rest.count(0) != len(rest):
                raise DamageError(
                    f"{self.label}: after byte {self.position}: data after the end of the archive"
                )
            self.position += len(rest)


def _checked_size(header: bytes, label: str, start: int) -> int:
    """The payload's size, after checking the header's checksum."""
    stated = _number(header[148:156], label, start)
    if sum(header) - sum(header[148:156]) + 8 * 32 != stated:
        raise DamageError(f"{label}: at byte {start}: the header's checksum is wrong: it was modified")
    return _number(header[124:136], label, start)


def _number(field: bytes, label: str, start: int) -> int:
    if field[0] == 0x80:  # GNU's base-256, for sizes from 8 GiB
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):  # int() would also take a sign, or an underscore
        raise DamageError(f"{label}: at byte {start}: this is not a tar header")
    return int(digits or b"0", 8)


def _header_name(header: bytes, label: str, start: int, names: str) -> str:
    name = header[0:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345] != 0:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name, label, start, names)


def _link_name(header: bytes, label: str, start: int, names: str) -> str:
    target = header[157:257].split(b"\0", 1)[0]
    return _text(target, label, start, names) if header[156:157] in _REFUSED_KINDS else ""


def _text(data: bytes, label: str, start: int, names: str) -> str:
    try:
        return data.decode(errors=names)
    except UnicodeDecodeError:
        raise DamageError(f"{label}: at byte {start}: a member's name is not UTF-8") from None


def _pax_records(body: bytes, label: str, start: int, names: str) -> dict[str, str]:
    records: dict[str, str] = {}
    while body:
        digits, _, _ = body.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) <= MAX_DIGITS else 0
        record = body[len(digits) + 1 : length]
        if not record.endswith(b"\n") or b"=" not in record:
            raise DamageError(f"{label}: at byte {start}: a damaged extended header")
        key, _, value = record[:-1].partition(b"=")
        if key in (b"path", b"size", b"linkpath"):
            records[key.decode()] = _text(value, label, start, names)
        body = body[length:]
    return records


def _pax_size(pax: dict[str, str], size: int, label: str, start: int) -> int:
    stated = pax.get("size", str(size))
    if not stated.isdecimal() or len(stated) > MAX_DIGITS:
        raise DamageError(f"{label}: at byte {start}: a size of {stated[:40]!r}")
    return int(stated)


def _refuse_unsafe(head: _Header, label: str) -> None:
    name, kind, size = head.name, head.kind, head.size
    where = f"{label}: member {name[:200]!r} at byte {head.start}"
    if kind in _REFUSED_KINDS:
        raise DamageError(f"{where}: is a {_REFUSED_KINDS[kind]}; only plain files are accepted")
    if kind not in _REGULAR and kind != _DIRECTORY:
        raise DamageError(f"{where}: is of the unknown type {kind!r}; only plain files are accepted")
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or "\\" in name:
        raise DamageError(f"{where}: an absolute name, or one with '..', is not accepted")
    if not name or len(name.encode()) > MAX_NAME_BYTES:
        raise DamageError(f"{where}: a name of {len(name)} characters is not accepted")
    if size > MAX_MEMBER_BYTES:
        raise DamageError(f"{where}: of {size} bytes is larger than {MAX_MEMBER_BYTES}")

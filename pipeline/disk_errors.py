"""What the system says against a file, as one line: the place, what is wrong there, and what to do."""

import errno
import os
import re
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import DiskFull, Outage, UserError

_ANOTHER = "choose another place"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_AWAY = {  # of disks that fail, and of file servers
    errno.EIO: "the disk does not read or write; look at its health (dmesg), then try again",
    errno.ESTALE: "the file server has lost it; mount it anew, then try again",
    errno.ENOTCONN: "the file server is gone; mount it anew, then try again",
}
_WRONG = {
    errno.EROFS: f"the file system is read-only; {_ANOTHER}",
    errno.EACCES: f"no permission; change its mode, or {_ANOTHER}",
    errno.EPERM: f"no permission; change its mode, or {_ANOTHER}",
    errno.EMFILE: "too many files are open in this process; raise its limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine; raise its limit (sysctl fs.file-max)",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
    errno.EFBIG: "the file is too large for the file system or for this user (ulimit -f); raise the limit",
    errno.ENOTDIR: f"a file stands where a folder is needed; remove it, or {_ANOTHER}",
    errno.EEXIST: f"a file stands where a folder is needed; remove it, or {_ANOTHER}",
    errno.EISDIR: f"a folder stands in its place; remove it, or {_ANOTHER}",
    errno.ELOOP: f"its links lead round in a circle; {_ANOTHER}",
    errno.EILSEQ: "the file system cannot hold this name; choose a plainer one",
}


@contextmanager
def disk_errors_at(place: Path | str, outage: type[Outage] = Outage) -> Generator[None]:
    """What the system refuses at `place` is raised as this program's error, in one line.

    DiskFull for a full disk, `outage` for one that fails, UserError for what a user must change. That something is not
    there is no such refusal, and stays FileNotFoundError.
    """
    try:
        yield
    except Exception as error:
        told = disk_error(error, place, outage)
        if told is None:
            raise
        raise told from error


def disk_error(
    error: Exception, place: Path | str | None = None, outage: type[Outage] = Outage
) -> UserError | None:
    """The error that the system's refusal stands for; None for anything else.

    `place` is the file or folder in question, where the error does not know it itself.
    """
    number = _number(error)
    where = place or getattr(error, "filename", None)
    if number in _FULL:
        where = where or _full_place() or "a disk"
        return DiskFull(f"{where}: {_lack(number, where)}; make room there, or {_ANOTHER}")
    if number in (errno.EMFILE, errno.ENFILE):
        return UserError(f"{where or 'files'}: {_WRONG[number]}")
    if where is None:  # a socket, say
        return None
    if number in _AWAY:
        return outage(f"{where}: {_AWAY[number]}")
    return UserError(f"{where}: {_WRONG[number]}") if number in _WRONG else None


def _number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))  # Rust's libraries have errors of their own
    return int(found[1]) if found and type(error).__module__.startswith(("safetensors", "builtins")) else None


def _lack(number: int, where: Path | str) -> str:
    if number == errno.EDQUOT:
        return "this user's quota is used up"
    path = Path(str(where).removeprefix("file://"))
    room = _room(next((p for p in (path, *path.parents) if p.exists()), path))
    has_inodes = room is None or room.f_files == 0 or room.f_favail > 0  # some file systems count none
    return "no room left on the disk" if has_inodes else "no more files fit on the disk (no inodes)"


def _full_place() -> str | None:
    """Of the places that every command writes to, one that is full."""
    for place in (tempfile.gettempdir(), str(Path.cwd()), os.path.expanduser("~")):
        room = _room(place)
        if room and (room.f_bavail == 0 or (room.f_files and room.f_favail == 0)):
            return place
    return None


def _room(place: Path | str) -> os.statvfs_result | None:
    try:
        return os.statvfs(place)
    except OSError:
        return None

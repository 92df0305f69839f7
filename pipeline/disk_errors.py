"""Operating system errors on files as errors of this program: one line with path, problem and remedy."""

import errno
import os
import re
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ddpm_pipeline.errors import DiskFull, Outage, UserError

_ELSEWHERE = "choose another place"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OUTAGES = {  # of disks that fail, and of file servers
    errno.EIO: "the disk does not read or write; look at its health (dmesg), then try again",
    errno.ESTALE: "the file server has lost it; mount it anew, then try again",
    errno.ENOTCONN: "the file server is gone; mount it anew, then try again",
}
_MISTAKES = {
    errno.EROFS: f"the file system is read-only; {_ELSEWHERE}",
    errno.EACCES: f"no permission; change its mode, or {_ELSEWHERE}",
    errno.EPERM: f"no permission; change its mode, or {_ELSEWHERE}",
    errno.EMFILE: "too many files are open in this process; raise its limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine; raise its limit (sysctl fs.file-max)",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
    errno.EFBIG: "the file is too large for the file system or for this user (ulimit -f); raise the limit",
    errno.ENOTDIR: f"a file stands where a folder is needed; remove it, or {_ELSEWHERE}",
    errno.EEXIST: f"a file stands where a folder is needed; remove it, or {_ELSEWHERE}",
    errno.EISDIR: f"a folder stands in its place; remove it, or {_ELSEWHERE}",
    errno.ELOOP: f"its links lead round in a circle; {_ELSEWHERE}",
    errno.EILSEQ: "the file system cannot hold this name; choose a plainer one",
}


@contextmanager
def disk_errors_at(place: Path | str, outage: type[Outage] = Outage) -> Generator[None]:
    """Translate the operating system's errors at `place` into this program's, in one line.

    DiskFull for a full disk, `outage` for a failing one, UserError for what a user must change. FileNotFoundError is
    not translated.
    """
    try:
        yield
    except Exception as error:
        translated = disk_error(error, place, outage)
        if translated is None:
            raise
        raise translated from error


def disk_error(
    error: Exception, place: Path | str | None = None, outage: type[Outage] = Outage
) -> UserError | None:
    """Translate an operating system error; None for any other error.

    `place`: the file or folder in question, if the error itself does not name it.
    """
    number = _number(error)
    where = place or getattr(error, "filename", None)
    if number in _FULL:
        where = where or _find_full_disk() or "a disk"
        return DiskFull(f"{where}: {_full_reason(number, where)}; make room there, or {_ELSEWHERE}")
    if number in (errno.EMFILE, errno.ENFILE):
        return UserError(f"{where or 'files'}: {_MISTAKES[number]}")
    if where is None:  # a socket, say
        return None
    if number in _OUTAGES:
        return outage(f"{where}: {_OUTAGES[number]}")
    return UserError(f"{where}: {_MISTAKES[number]}") if number in _MISTAKES else None


def _number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))  # errors of Rust libraries are no OSError
    return int(found[1]) if found and type(error).__module__.startswith(("safetensors", "builtins")) else None


def _full_reason(number: int, where: Path | str) -> str:
    if number == errno.EDQUOT:
        return "this user's quota is used up"
    path = Path(str(where).removeprefix("file://"))
    space = _free_space(next((p for p in (path, *path.parents) if p.exists()), path))
    has_inodes = space is None or space.f_files == 0 or space.f_favail > 0  # some file systems report none
    return "no room left on the disk" if has_inodes else "no more files fit on the disk (no inodes)"


def _find_full_disk() -> str | None:
    """Of the places that every command writes to, a full one, or None."""
    for place in (tempfile.gettempdir(), str(Path.cwd()), os.path.expanduser("~")):
        space = _free_space(place)
        if space and (space.f_bavail == 0 or (space.f_files and space.f_favail == 0)):
            return place
    return None


def _free_space(place: Path | str) -> os.statvfs_result | None:
    try:
        return os.statvfs(place)
    except OSError:
        return None

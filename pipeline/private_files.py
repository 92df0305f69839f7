"""Private folders and files: created with mode 0700, opened without following links, owner and mode checked.

What another user may have planted (in a shared temporary folder, or in a folder that one was sent) is rejected in one
line before it is read, written or trusted.
"""

import errno
import fcntl
import os
import pwd
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ddpm_pipeline.errors import UserError

SAFE_VARIABLE = "DDPM_SAFE_FOLDERS"
"""Folders, separated by ':', that are trusted whoever owns them, like git's safe.directory."""
STATE_VARIABLE, CACHE_VARIABLE = "XDG_STATE_HOME", "XDG_CACHE_HOME"
_OTHERS_MAY_WRITE = 0o022
_NO_FILE = (errno.ELOOP, errno.ENXIO, errno.EISDIR)  # a link, a pipe that nobody reads, a folder


def state_folder(name: str) -> Path:
    """This user's state folder `name`: below $XDG_STATE_HOME/ddpm, else ~/.local/state/ddpm.

    Without a writable home (a container), below ddpm-UID in the temporary folder. Created if missing; UserError when
    another user created it.
    """
    return _users_folder(STATE_VARIABLE, ".local/state", name)


def cache_folder(name: str) -> Path:
    """This user's folder `name` of files that can be fetched again: as `state_folder`, but below $XDG_CACHE_HOME/ddpm,
    else ~/.cache/ddpm.
    """
    return _users_folder(CACHE_VARIABLE, ".cache", name)


def _users_folder(variable: str, below_home: str, name: str) -> Path:
    home = Path(os.environ.get(variable, ""))
    try:
        base = private_folder((home if home.is_absolute() else Path.home() / below_home) / "ddpm")
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        base = private_folder(Path(tempfile.gettempdir()) / f"ddpm-{os.geteuid()}")
    return private_folder(base / name)


def private_folder(path: Path) -> Path:
    """`path`, a folder that only this user can have written to; created if missing. Raises as `require_own`."""
    while True:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            break
        except FileExistsError:
            # it may have been a folder that was removed before Python looked what it is: then make it again
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise UserError(f"{path}: is no folder; remove it, or choose another place") from None
    require_own(path)
    return path


def require_own(path: Path) -> None:
    """Raise UserError unless a file or folder belongs to this user and nobody else may write to it.

    A link must be this user's too, and so must its target. OSError if nothing exists there.
    """
    found = path.lstat()
    if _is_safe(path):
        return
    for one in (found, path.stat()) if stat.S_ISLNK(found.st_mode) else (found,):
        if one.st_uid != os.geteuid():
            raise UserError(
                f"{path}: belongs to {_user(one.st_uid)}, so that nothing in it is obeyed; use a place of your own, "
                f"or, if you trust its owner, set {SAFE_VARIABLE}={path}"
            )
        if one.st_mode & _OTHERS_MAY_WRITE and not stat.S_ISLNK(one.st_mode):
            mode = stat.S_IMODE(one.st_mode)
            raise UserError(
                f"{path}: others may write to it (mode {mode:o}); look at what is in it, then chmod go-w {path}"
            )


def open_private(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file of this user, created with mode 0600 if `flags` say so.

    Raises UserError for a link, for anything but a regular file, and for a file that others own or that has other hard
    links. FileNotFoundError as usual. Do not pass O_TRUNC: truncate the returned descriptor instead.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its other end.
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise UserError(f"{path}: is a link or no plain file; remove it") from None
        raise
    found = os.fstat(fd)
    plain = stat.S_ISREG(found.st_mode) and found.st_nlink <= 1  # 0: removed since by its owner
    if plain and (found.st_uid == os.geteuid() or _is_safe(path)):
        return fd
    os.close(fd)
    what = f"belongs to {_user(found.st_uid)}" if plain else "is no plain file of one name"
    raise UserError(f"{path}: {what}; remove it")


@contextmanager
def private_lock(path: Path) -> Generator[None]:
    """Hold an exclusive lock on a file, as `open_private` opens it; waits for other holders.

    The system releases the lock when the process dies.
    """
    fd = open_private(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def read_private(path: Path, most_bytes: int) -> bytes:
    """The bytes of a file as `open_private` opens it. UserError when there are more than `most_bytes`."""
    with open(open_private(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > most_bytes:
            raise UserError(f"{path}: is longer than {most_bytes} bytes; remove it")
        return file.read()


def read_secret(path: Path, most_bytes: int) -> bytes:
    """As `read_private`, also through links, behind which Kubernetes mounts secrets. UserError where others than the
    owner can read the file.
    """
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"{path}: others can read this private key; run chmod 600 {path}")
    return read_private(path.resolve(), most_bytes)


def _is_safe(path: Path) -> bool:
    """Whether the user has declared this location as trusted."""
    folders = [Path(text) for text in os.environ.get(SAFE_VARIABLE, "").split(os.pathsep) if text]
    place = path.resolve()
    return any(place.is_relative_to(folder.resolve()) for folder in folders if folder.is_absolute())


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"

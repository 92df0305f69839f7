"""The kinds of failure that a user sees."""

import re

MAX_CHARACTERS = 1500
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


class OneLineError(Exception):
    """A failure described in one line; control characters of names in it are replaced."""

    def __init__(self, message: str) -> None:
        line = _CONTROL.sub(" ", message).strip()
        super().__init__(line if len(line) <= MAX_CHARACTERS else line[:MAX_CHARACTERS] + "…")


class UserError(OneLineError):
    """A mistake that the user can correct; raised before work starts.

    The message is one line: it names the field, file or object, the problem, and the remedy.
    The command line prints it without a traceback and exits with code 2.
    """


class Outage(UserError):  # noqa: N818 - what happened is the name
    """A service does not respond: the request was valid, and trying again later may help.

    The command line prints it without a traceback and exits with code 1, so that a supervisor retries.
    """


class DiskFull(UserError):  # noqa: N818
    """A disk, a bucket or a quota is full. Finished work is kept; the same command resumes once there is space.

    The command line prints it without a traceback and exits with code 1.
    """


class DamageError(OneLineError):
    """Stored bytes that do not match their record: a truncated shard, a wrong hash, a missing member.

    The message names the object, the place in it (member, offset) and the cause.
    """


class JobError(OneLineError):
    """A failure after work started that neither user nor data caused: a lost cluster, a divergence.

    The message is one line that says what to do; the command line prints it and exits with code 1.
    """

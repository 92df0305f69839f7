"""The kinds of failure a person meets."""

import re

MOST_CHARACTERS = 1500
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


class OneLineError(Exception):
    """A failure told in one line, whatever the names in it hold; a terminal obeys none of them."""

    def __init__(self, message: str) -> None:
        line = _CONTROL.sub(" ", message).strip()
        super().__init__(line if len(line) <= MOST_CHARACTERS else line[:MOST_CHARACTERS] + "…")


class UserError(OneLineError):
    """What a user can put right; raised before work starts.

    The message is one line: it names the field, file or object, says what is wrong with it, and what to do.
    The command line prints it without a traceback and exits with code 2.
    """


class Outage(UserError):  # noqa: N818 - what happened is the name
    """A service does not answer: nothing is wrong with what was asked, and trying again later may help.

    The command line prints it without a traceback and exits with code 1, so that a supervisor tries again.
    """


class DiskFull(UserError):  # noqa: N818
    """A disk, a bucket or a quota is full. What is done is kept; once there is room, the same command goes on.

    The command line prints it without a traceback and exits with code 1.
    """


class DamageError(OneLineError):
    """Stored bytes that are not what their record says: a torn shard, a wrong hash, a missing member.

    The message names the object, the place in it (member, offset) and the cause.
    """


class JobError(OneLineError):
    """What went wrong after work had begun and is neither the user's nor the data's: a lost cluster, a divergence.

    The message is one line that says what to do; the command line prints it and exits with code 1.
    """

"""The two kinds of failure a person meets."""


class UserError(Exception):
    """What a user can put right; raised before work starts.

    The message is one line: it names the field, file or object, says what is wrong with it, and what to do.
    The command line prints it without a traceback and exits with code 2.
    """


class DamageError(Exception):
    """Stored bytes that are not what their record says: a torn shard, a wrong hash, a missing member.

    The message names the object, the place in it (member, offset) and the cause.
    """

"""Which count stands at a prefix: the largest that anything there proves, whatever `spec.json` says at the moment.

Not every store has a conditional write, so a driver that was suspended between its look and its write (a closed lid, a
frozen machine) may put an older `spec.json` or `manifest.json` over a newer one. Done-records cannot be lost that way:
each has a key of its own, which names the count it belongs to, and only a larger count's job deletes it. So the largest
count that a record speaks of is a register that never goes back, and whoever writes looks at it again afterwards.
"""

import heapq
from contextlib import suppress

from pipeline.errors import DamageError, UserError
from pipeline.generate.done_records import read_record
from pipeline.generate.layout import CLAIM_PREFIX, DONE_PREFIX, SPEC_KEY
from pipeline.generate.manifest import read_manifest
from pipeline.generate.plan import end_of, num_shards, shard
from pipeline.generate.spec import Spec, pretty, read_spec, require_extension
from pipeline.store import ObjectMissing, Store

_CANDIDATES = 16


def proven_spec(store: Store) -> Spec | None:
    """The spec that owns a prefix, with the count that stands; None at a prefix without spec."""
    spec = read_spec(store)
    return None if spec is None else at_least(store, spec)


def check_prefix(store: Store, spec: Spec) -> Spec | None:
    """The spec that stands at the prefix, if `spec` is the same or extends it; None at an empty prefix.

    UserError when the prefix holds another generation (the differing fields are named), more samples than are
    asked for now, or something that is no generation at all. Reads and writes no sample.
    """
    there = proven_spec(store)
    if there is None:
        stranger = next((info for info in store.list() if not info.key.startswith(CLAIM_PREFIX)), None)
        if stranger is None:
            return None
        # Another job may have claimed the prefix between the two requests: only a second look tells it from a stranger.
        there = proven_spec(store)
        if there is None:
            raise UserError(
                f"{store.uri}: holds {stranger.key} but no {SPEC_KEY}, so it is no generation; "
                "choose an empty output prefix"
            )
    require_extension(store, there, spec)
    return there


def at_least(store: Store, spec: Spec) -> Spec:
    """`spec`, its count raised to the largest that manifest or records of the same generation prove."""
    with suppress(DamageError):  # a damaged manifest proves nothing
        manifest = read_manifest(store)
        if manifest is not None and manifest.spec.digest == spec.digest and manifest.count > spec.count:
            spec = spec.model_copy(update={"count": manifest.count})
    return spec.model_copy(update={"count": _recorded(store, spec)})


def raise_count(store: Store, spec: Spec) -> Spec:
    """Make `spec.json` say `spec.count`, or the larger count that stands, and return the spec that stands then.

    UserError when the prefix belongs to another generation.
    """
    while True:
        there = read_spec(store)
        if there is not None:
            require_extension(store, there, spec.model_copy(update={"count": max(spec.count, there.count)}))
        stands = at_least(store, spec if there is None or there.count < spec.count else there)
        if there == stands:
            return stands
        store.write(SPEC_KEY, pretty(stands.model_dump(mode="json")))


def _recorded(store: Store, spec: Spec) -> int:
    """The largest count, from `spec.count` on, that a sound done-record of this generation speaks of.

    A larger count has a record with the number of this count's last shard, or the one after: two short listings tell
    whether it is worth listing them all.
    """
    last = num_shards(spec) - 1
    if not any(_ends(store, spec, f"{DONE_PREFIX}{number:06d}") for number in (last, last + 1)):
        return spec.count
    for end in heapq.nlargest(_CANDIDATES, _ends(store, spec, DONE_PREFIX)):
        larger = spec.model_copy(update={"count": end})
        with suppress(DamageError, ObjectMissing):
            read_record(store, larger, shard(larger, num_shards(larger) - 1))
            return end
    return spec.count


def _ends(store: Store, spec: Spec, prefix: str) -> set[int]:
    """Counts above `spec.count` that the names of records speak of."""
    names = (info.key.removeprefix(DONE_PREFIX).removesuffix(".json") for info in store.list(prefix))
    return {end for name in names if (end := end_of(spec, name) or 0) > spec.count}

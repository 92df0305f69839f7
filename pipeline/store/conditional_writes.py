"""Does a store heed `If-None-Match: *`, so that of several jobs that write a new object only one succeeds?

AWS says so of S3; some services accept the condition and overwrite anyway, and a service may check it and write in two
steps. So a store is tried once for each process: two writes in turn, then several at the same time. What is written
reads as a claim of nobody, in case that other jobs look at the same moment.
"""

import logging
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

from ddpm_pipeline.store.interface import ABSENT, ObjectChanged, Store

NOBODYS_CLAIM = b'{"round":0}'
ROUNDS, WRITERS = 2, 4
_known: dict[str, bool] = {}
_asking = threading.Lock()
log = logging.getLogger(__name__)


def heeds_conditions(store: Store, prefix: str) -> bool:
    """Whether new objects can be written on condition; False for directories. Writes and deletes keys below `prefix`.

    Raises what the store raises.
    """
    service = store.service
    if service is None:
        return False
    with _asking:
        if service not in _known:
            _known[service] = _try(store, prefix)
            how = "If-None-Match" if _known[service] else "consensus, as it ignores If-None-Match"
            log.info("%s: empty prefixes are claimed by %s", service, how)
        return _known[service]


def _try(store: Store, prefix: str) -> bool:
    name = f"{prefix}probe-{uuid.uuid4().hex}"
    keys = [f"{name}.{number:04d}.json" for number in range(1 + ROUNDS)]
    try:
        store.write(keys[0], NOBODYS_CLAIM)
        if _is_written(store, keys[0]):
            return False
        with ThreadPoolExecutor(WRITERS) as pool:
            for key in keys[1:]:
                if sum(pool.map(_is_written, [store] * WRITERS, [key] * WRITERS)) > 1:
                    return False
        return True
    finally:
        for key in keys:
            store.delete(key)


def _is_written(store: Store, key: str) -> bool:
    try:
        store.write(key, NOBODYS_CLAIM, replaces=ABSENT)
    except ObjectChanged:
        return False
    return True

"""Ray reads these when it is first imported, which is before the stack is there to say so."""

import os

from infra.local.ray import LOOPBACK_SETTINGS

os.environ.update(LOOPBACK_SETTINGS)
os.environ.setdefault("RAY_AUTH_MODE", "token")

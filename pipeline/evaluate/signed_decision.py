"""Signatures of the gate's decisions, stored as a tag beside them, and the check that nights make of a champion."""

import hashlib

from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.signatures import PublicKey, SigningKey, Statement, open_envelope
from ddpm_pipeline.tracking import ModelVersion

SIGNATURE_TAG = "ddpm.gate.signature"
PREDICATE_TYPE = "urn:ddpm-pipeline:gate-decision:1"
_DECISION, _WEIGHTS = "ddpm.gate.decision", "model.safetensors"


def sign_decision(signer: SigningKey, version: ModelVersion, verdict: str, text: str) -> str:
    """The envelope of a decision about `version`; `text` is the decision as its tag holds it."""
    statement = Statement.about(
        {_DECISION: hashlib.sha256(text.encode()).hexdigest(), _WEIGHTS: version.sha256},
        PREDICATE_TYPE,
        {"model": version.reference, "verdict": verdict},
    )
    return signer.sign(statement).decode()


def require_signed(version: ModelVersion, key: PublicKey) -> None:
    """UserError, in a line that names the version, unless `key` has signed that the gate promoted these weights."""
    where = f"model {version.reference}"
    remedy = "promote it with the key: ddpm promote"
    envelope, text = version.tags.get(SIGNATURE_TAG), version.tags.get(_DECISION)
    if envelope is None or text is None:
        raise UserError(f"{where}: has no signed decision of the gate (require_signed); {remedy}")
    try:
        statement = open_envelope(envelope.encode(), key, f"{where}: tag {SIGNATURE_TAG}")
    except DamageError as error:
        raise UserError(f"{error} (require_signed); {remedy}") from None
    found = {_DECISION: hashlib.sha256(text.encode()).hexdigest(), _WEIGHTS: version.sha256}
    for name, sha256 in found.items():
        if statement.predicateType != PREDICATE_TYPE or statement.digests.get(name) != sha256:
            raise UserError(f"{where}: its {name} is not the one whose promotion was signed; {remedy}")
    signed = statement.predicate
    if (signed.get("model"), signed.get("verdict")) != (version.reference, "promoted"):
        said = f"{signed.get('model')} {signed.get('verdict')}"
        raise UserError(f"{where}: the signed decision is {said!r}, not its promotion; {remedy}")

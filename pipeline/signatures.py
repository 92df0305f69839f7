"""Ed25519 signatures of what jobs leave behind: in-toto statements in DSSE envelopes.

A statement (https://in-toto.io/Statement/v1) names objects by their sha256 and says what they are. The envelope (DSSE
1.0) holds the statement's bytes and a signature over them and their type. Ed25519 is deterministic: the same statement
and key give the same envelope. The private key comes from a file or the environment and goes nowhere else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import Sha256
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.private_files import open_private, read_secret

KEY_FILE_VARIABLE = "DDPM_SIGNING_KEY_FILE"
"""The file of the private key, PEM."""
KEY_VARIABLE = "DDPM_SIGNING_KEY"
"""The PEM text itself, where a secret comes as a variable."""
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_MAX_KEY_BYTES = 16_384
_BROKEN_KEY = (ValueError, TypeError, UnsupportedAlgorithm)


@dataclass(frozen=True)
class PublicKey:
    """The key that checks signatures. Anyone may have it."""

    key: Ed25519PublicKey

    @property
    def text(self) -> str:
        """SubjectPublicKeyInfo in base64: one line, as in the PEM file."""
        return base64.b64encode(self._der).decode()

    @property
    def pem(self) -> bytes:
        """The PEM file."""
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self.key.public_bytes(serialization.Encoding.PEM, form)

    @property
    def key_id(self) -> str:
        """Hex sha256 of SubjectPublicKeyInfo."""
        return hashlib.sha256(self._der).hexdigest()

    @property
    def _der(self) -> bytes:
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self.key.public_bytes(serialization.Encoding.DER, form)

    @classmethod
    def read(cls, text: str) -> PublicKey:
        """From a PEM file's path, or from the one line that `ddpm keys show` prints. UserError for anything else."""
        try:
            if Path(text).is_file():
                found = serialization.load_pem_public_key(Path(text).read_bytes()[:_MAX_KEY_BYTES])
            else:
                found = serialization.load_der_public_key(base64.b64decode(text, validate=True))
        except (*_BROKEN_KEY, OSError):
            raise UserError(
                f"key {text[:80]!r}: neither the file of a public key nor its line; `ddpm keys show` prints both"
            ) from None
        if not isinstance(found, Ed25519PublicKey):
            raise UserError(f"key {text[:80]!r}: is no Ed25519 key; make one with `ddpm keys create FILE`")
        return cls(found)


@dataclass(frozen=True, repr=False)
class SigningKey:
    """The key that signs. It is not shown, pickled or stored."""

    key: Ed25519PrivateKey

    @property
    def public(self) -> PublicKey:
        """Its public part."""
        return PublicKey(self.key.public_key())

    def __reduce__(self) -> Any:
        raise TypeError("a signing key stays in its process")

    @classmethod
    def configured(cls) -> SigningKey | None:
        """The key of this process's environment, or None. UserError where it cannot be used."""
        path, text = os.environ.get(KEY_FILE_VARIABLE), os.environ.get(KEY_VARIABLE)
        if path:
            return cls.from_file(Path(path))
        return cls._parse(text.encode(), KEY_VARIABLE) if text else None

    @classmethod
    def from_file(cls, path: Path) -> SigningKey:
        """From a PEM file that only its owner can read. UserError for any other."""
        try:
            data = read_secret(path, _MAX_KEY_BYTES)
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; {KEY_FILE_VARIABLE} names the private key's file, "
                "which `ddpm keys create FILE` makes"
            ) from None
        return cls._parse(data, str(path))

    @classmethod
    def _parse(cls, pem: bytes, where: str) -> SigningKey:
        try:
            found = serialization.load_pem_private_key(pem, password=None)
        except _BROKEN_KEY:
            raise UserError(f"{where}: is no private key in PEM without a password") from None
        if not isinstance(found, Ed25519PrivateKey):
            raise UserError(f"{where}: is no Ed25519 key; make one with `ddpm keys create FILE`")
        return cls(found)

    @classmethod
    def create(cls, path: Path) -> SigningKey:
        """A new key in the file `path`, mode 0600, and its public part in `path`.pub. UserError if either exists."""
        made = cls(Ed25519PrivateKey.generate())
        private = made.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        for place, data in ((path, private), (path.with_name(f"{path.name}.pub"), made.public.pem)):
            try:
                with open(open_private(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                    file.write(data)
            except OSError as error:
                raise UserError(f"{place}: {error.strerror}; name a new file in a folder of yours") from None
        return made

    def sign(self, statement: Statement) -> bytes:
        """The envelope of a statement."""
        payload = _canonical(statement.model_dump(mode="json", by_alias=True))
        signature = self.key.sign(_authenticated(PAYLOAD_TYPE, payload))
        envelope = Envelope(
            payload=base64.b64encode(payload).decode(),
            payloadType=PAYLOAD_TYPE,
            signatures=(
                EnvelopeSignature(keyid=self.public.key_id, sig=base64.b64encode(signature).decode()),
            ),
        )
        return _canonical(envelope.model_dump(mode="json"))


class Digest(Settings):
    """How an object is known."""

    sha256: Sha256


class Subject(Settings):
    """An object that a statement is about."""

    name: str = Field(max_length=2048)
    digest: Digest


class Statement(Settings):
    """An in-toto statement."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(default=STATEMENT_TYPE, alias="_type")
    subject: tuple[Subject, ...] = Field(max_length=100)
    predicateType: str = Field(max_length=2048)  # noqa: N815 - in-toto's name
    predicate: dict[str, str | int]

    @classmethod
    def about(
        cls, digests: Mapping[str, str], predicate_type: str, predicate: dict[str, str | int]
    ) -> Statement:
        """A statement about objects, given by name and hex sha256."""
        subjects = tuple(Subject(name=name, digest=Digest(sha256=sha)) for name, sha in digests.items())
        return cls(subject=subjects, predicateType=predicate_type, predicate=predicate)

    @property
    def digests(self) -> dict[str, str]:
        """Hex sha256 of each object by name."""
        return {subject.name: subject.digest.sha256 for subject in self.subject}


class EnvelopeSignature(Settings):
    """A signature, base64, and the id of its key."""

    keyid: str = Field(default="", max_length=200)
    sig: str = Field(max_length=200)


class Envelope(Settings):
    """A DSSE envelope."""

    payload: str = Field(max_length=1 << 20)
    payloadType: str = Field(max_length=200)  # noqa: N815 - DSSE's name
    signatures: tuple[EnvelopeSignature, ...] = Field(min_length=1, max_length=20)


def open_envelope(data: bytes, key: PublicKey, where: str) -> Statement:
    """The statement in an envelope that `key` has signed. DamageError, about `where`, for any other."""
    envelope = parse_document(Envelope, data, where, "a DSSE envelope")
    try:
        payload = base64.b64decode(envelope.payload, validate=True)
        signatures = [base64.b64decode(one.sig, validate=True) for one in envelope.signatures]
    except ValueError as error:
        raise DamageError(f"{where}: is no DSSE envelope ({error})") from None
    if not any(_is_valid(key, signature, envelope.payloadType, payload) for signature in signatures):
        named = {one.keyid for one in envelope.signatures}
        if key.key_id in named:
            raise DamageError(f"{where}: its content is not what key {key.key_id[:16]}… has signed")
        others = ", ".join(sorted(f"{one[:16]}…" for one in named))
        raise DamageError(f"{where}: is signed by {others or 'an unnamed key'}, not by {key.key_id[:16]}…")
    if envelope.payloadType != PAYLOAD_TYPE:
        raise DamageError(f"{where}: holds {envelope.payloadType}, not an in-toto statement")
    return parse_document(Statement, payload, where, "an in-toto statement")


def _is_valid(key: PublicKey, signature: bytes, kind: str, payload: bytes) -> bool:
    try:
        key.key.verify(signature, _authenticated(kind, payload))
    except InvalidSignature:
        return False
    return True


def _authenticated(kind: str, payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

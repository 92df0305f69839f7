"""C2PA manifests ("Content Credentials") in exported images, through c2pa-python.

A manifest says that a trained model made the image, and of which generation it is which sample. It is signed with a
certificate of the user's. It has a random identifier and the time of its signature, so no two are the same bytes: it
is written into exported files, never into shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from PIL import Image

from ddpm_pipeline import __version__
from ddpm_pipeline.data.formats.provenance import TRAINED
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.private_files import read_secret

KINDS = ("png", "webp")
"""Image formats that can hold a manifest."""
_ASSERTION = "ddpm-pipeline.sample"
_SETTINGS = {"builder": {"thumbnail": {"enabled": False}}, "verify": {"verify_trust": False}}
"""Whether a certificate is trusted is for those who get the images to say."""
_MAX_BYTES = 1 << 20
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


@dataclass(frozen=True)
class SignedSample:
    """What a manifest says of its image."""

    spec_digest: str
    """Digest of the spec of the generation."""
    index: int
    """Index of the sample."""
    sha256: str
    """Hex digest of the image as the shard has it, without manifest."""

    @classmethod
    def of(cls, spec_digest: str, index: int, image: bytes) -> SignedSample:
        """For the bytes of an image without manifest."""
        return cls(spec_digest, index, hashlib.sha256(image).hexdigest())


class ContentCredentials:
    """Signs images with a certificate. Several threads may use it."""

    def __init__(self, key: Path, certificates: Path) -> None:
        """`key`: the private key, PEM, without password. `certificates`: its certificate and those of the issuers, PEM.

        UserError in one line for files that cannot be read, do not belong together, or are not what C2PA accepts.
        """
        self._c2pa = _library()
        private = _private_key(key)
        chain = _read(certificates, lambda: certificates.read_bytes()[:_MAX_BYTES])
        try:
            first = x509.load_pem_x509_certificates(chain)[0]
        except (ValueError, UnsupportedAlgorithm):
            raise UserError(f"{certificates}: holds no certificate in PEM") from None
        if _public_bytes(first.public_key()) != _public_bytes(private.public_key()):
            raise UserError(f"{certificates}: its first certificate is not that of the key {key}")
        self.fingerprint = hashlib.sha256(first.public_bytes(serialization.Encoding.DER)).hexdigest()
        """SHA-256 of the certificate, hex."""
        self._context = self._c2pa.Context.from_dict(_SETTINGS)
        self._signer = self._signer_of(key, private, certificates, chain)
        self._lock = threading.Lock()

    def sign(self, image: bytes, kind: str, sample: SignedSample) -> bytes:
        """The image of a kind of `KINDS` with a manifest: same pixels, about 3 kB more."""
        with self._lock:
            return self._signed(self._signer, image, kind, sample)

    def is_signed(self, image: bytes, kind: str, sample: SignedSample) -> bool:
        """Whether the image is unchanged since a manifest of this sample was signed in it."""
        try:
            with self._c2pa.Reader(f"image/{kind}", io.BytesIO(image), context=self._context) as reader:
                found: Any = json.loads(reader.json())
        except self._c2pa.C2paError:
            return False
        assertions = found["manifests"][found["active_manifest"]].get("assertions", [])
        said = [one["data"] for one in assertions if one["label"] == _ASSERTION]
        return found.get("validation_state") == "Valid" and said == [asdict(sample)]

    def _signer_of(self, key: Path, private: _PrivateKey, certificates: Path, chain: bytes) -> Any:
        """The library's signer, tried once, as it looks at a certificate only when it signs."""
        pem = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        algorithm = getattr(self._c2pa.C2paSigningAlg, _algorithm_of(private, key))
        png = _smallest_png()
        try:
            info = self._c2pa.C2paSignerInfo(alg=algorithm, sign_cert=chain, private_key=pem, ta_url=None)
            signer = self._c2pa.Signer.from_info(info)
            self._signed(signer, png, "png", SignedSample.of("0" * 64, 0, png))
        except self._c2pa.C2paError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{certificates}: C2PA does not accept it ({reason}); it takes a valid certificate for signing "
                "documents or mail, issued by another, followed by those of its issuers"
            ) from None
        return signer

    def _signed(self, signer: Any, image: bytes, kind: str, sample: SignedSample) -> bytes:
        manifest = {
            "claim_generator_info": [{"name": "ddpm-pipeline", "version": __version__}],
            "title": f"{sample.index:012d}.{kind}",
            "assertions": [
                {
                    "label": "c2pa.actions.v2",
                    "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": TRAINED}]},
                },
                {"label": _ASSERTION, "data": asdict(sample)},
            ],
        }
        signed = io.BytesIO()
        with self._c2pa.Builder(json.dumps(manifest), context=self._context) as builder:
            builder.sign(signer, f"image/{kind}", io.BytesIO(image), signed)
        return signed.getvalue()


_PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


def _private_key(file: Path) -> _PrivateKey:
    try:
        found = serialization.load_pem_private_key(_read(file, lambda: read_secret(file, _MAX_BYTES)), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(
            f"{file}: holds no private key in PEM, or one with a password; remove the password"
        ) from None
    if not isinstance(found, _PrivateKey):
        raise UserError(f"{file}: C2PA signs with EC, Ed25519 and RSA keys only; use one of these")
    return found


def _read(file: Path, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name the PEM file") from None


def _algorithm_of(key: _PrivateKey, file: Path) -> str:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ED25519"
    if isinstance(key, rsa.RSAPrivateKey):
        return "PS256"
    if key.curve.name not in _CURVES:
        raise UserError(f"{file}: C2PA has no curve {key.curve.name}; use one of {', '.join(_CURVES)}")
    return _CURVES[key.curve.name]


def _public_bytes(key: Any) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.DER, form)


def _smallest_png() -> bytes:
    out = io.BytesIO()
    Image.new("L", (1, 1)).save(out, "PNG")
    return out.getvalue()


def _library() -> Any:
    try:
        import c2pa  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError:
        raise UserError(
            "--c2pa-key needs c2pa-python, which is not installed: pip install 'ddpm-pipeline[c2pa]'"
        ) from None
    return c2pa

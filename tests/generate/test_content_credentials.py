"""Exported images carry a C2PA manifest that a reader of its own finds valid, and that a download keeps."""

import io
import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

from ddpm_pipeline.data.formats.provenance import read_mark
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.download import run
from tests.data.making import sixty
from tests.generate.tiny import fill, settings, tiny_model

c2pa: Any = pytest.importorskip("c2pa", reason="needs the extra `c2pa`: pip install c2pa-python")

KEYS = {
    "EC": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EC of 384 bits": lambda: ec.generate_private_key(ec.SECP384R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
}


def certificate(name: str, key: Any, issuer: str, by: Any, is_ca: bool) -> bytes:
    """A certificate as C2PA wants it, PEM."""

    def named(text: str) -> x509.Name:
        attributes = ((NameOID.ORGANIZATION_NAME, "Tests"), (NameOID.COMMON_NAME, text))
        return x509.Name([x509.NameAttribute(kind, value) for kind, value in attributes])

    uses = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
    )
    uses += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    allowed = ("key_cert_sign", "crl_sign") if is_ca else ("digital_signature",)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(named(issuer), named(name), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
        .add_extension(x509.KeyUsage(**{use: use in allowed for use in uses}), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
    )
    if not is_ca:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(usage, critical=False)
    digest = None if isinstance(by, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(by, digest).public_bytes(serialization.Encoding.PEM)


class Signer:
    """A key and its certificates as files."""

    def __init__(self, folder: Path, kind: str = "EC") -> None:
        folder.mkdir()
        authority, key = ec.generate_private_key(ec.SECP256R1()), KEYS[kind]()
        self.key, self.certificates = folder / "key.pem", folder / "chain.pem"
        pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        self.key.write_bytes(key.private_bytes(*pem))
        self.key.chmod(0o600)
        own = certificate("A signer", key, "An authority", authority, is_ca=False)
        issuer = certificate("An authority", authority, "An authority", authority, is_ca=True)
        self.certificates.write_bytes(own + issuer)
        self.self_signed = folder / "self.pem"
        self.self_signed.write_bytes(certificate("A signer", key, "A signer", key, is_ca=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generations of 23 images, in each format."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny_model(folder / "model")
    for kind in ("png", "webp", "npy"):
        fill(settings(model, f"file://{folder}/{kind}", count=23, image_format=kind))
    return folder


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return Signer(tmp_path / "signer")


def download(source: Path, to: Path, signer: Signer | None) -> dict[str, bytes]:
    """The unpacked images by name."""
    given = (None, None) if signer is None else (signer.key, signer.certificates)
    assert run(source.as_uri(), str(to), True, False, *given) == 0
    images = to.with_name(f"{to.name}-images")
    return {path.name: path.read_bytes() for path in images.rglob("0*.*") if path.is_file()}


def manifest_of(image: bytes, kind: str) -> tuple[str, dict[str, Any]]:
    """What a reader with settings of its own says of an image: its state, and its manifest."""
    with c2pa.Reader(f"image/{kind}", io.BytesIO(image)) as reader:
        found = json.loads(reader.json())
    faults = {status["code"] for status in found.get("validation_status", [])}
    assert faults <= {"signingCredential.untrusted"}, faults
    return found["validation_state"], found["manifests"][found["active_manifest"]]


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_each_image_says_who_made_it_and_keeps_its_pixels(
    made: Path, tmp_path: Path, signer: Signer, kind: str
) -> None:
    plain = download(made / kind, tmp_path / "plain", None)
    signed = download(made / kind, tmp_path / "signed", signer)
    assert signed.keys() == plain.keys()
    assert len(signed) == 23
    for name, image in signed.items():
        _, manifest = manifest_of(image, kind)
        said = {one["label"]: one["data"] for one in manifest["assertions"]}
        (action,) = said["c2pa.actions.v2"]["actions"]
        assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
        mark = read_mark(plain[name])
        assert mark is not None
        assert (said["ddpm-pipeline.sample"]["spec_digest"], said["ddpm-pipeline.sample"]["index"]) == (
            mark.spec_digest,
            int(name.partition(".")[0]),
        )
        assert manifest["signature_info"]["common_name"] == "A signer"
        assert read_mark(image) == mark
        assert list(Image.open(io.BytesIO(image)).tobytes()) == list(
            Image.open(io.BytesIO(plain[name])).tobytes()
        )


def test_again_signs_only_what_is_missing_or_changed(made: Path, tmp_path: Path, signer: Signer) -> None:
    before = download(made / "png", tmp_path / "out", signer)
    (changed, lost, *_) = sorted((tmp_path / "out-images").rglob("0*.png"))
    changed.write_bytes(changed.read_bytes()[:-20] + b"\0" * 20)
    lost.unlink()
    after = download(made / "png", tmp_path / "out", signer)
    assert {name for name in before if before[name] != after[name]} == {changed.name, lost.name}
    assert all(manifest_of(image, "png") for image in after.values())


@pytest.mark.parametrize("kind", KEYS)
def test_every_kind_of_key_signs(made: Path, tmp_path: Path, kind: str) -> None:
    (first, *_) = download(made / "png", tmp_path / "out", Signer(tmp_path / "signer", kind)).values()
    assert manifest_of(first, "png")


def test_what_cannot_be_signed_is_refused_before_anything_is_written(
    made: Path, tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = (made / "png").as_uri(), tmp_path / "out"
    other = Signer(tmp_path / "other")
    open_key = Path(shutil.copy(signer.key, tmp_path / "open.pem"))
    open_key.chmod(0o644)
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    junk.chmod(0o600)
    sixty(f"file://{tmp_path}/set")
    own, chain = signer.key, signer.certificates
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((source, True, own, None), "belong together; give both"),
        ((source, False, own, chain), "add --unpack"),
        ((source, True, own, other.certificates), "its first certificate is not that of the key"),
        ((source, True, own, signer.self_signed), "C2PA does not accept it .*self-signed.*issued by another"),
        ((source, True, open_key, chain), "others can read this private key; run chmod 600"),
        ((source, True, junk, chain), "holds no private key in PEM"),
        ((source, True, own, junk), "holds no certificate in PEM"),
        ((source, True, tmp_path / "none", chain), "No such file or directory; name the PEM file"),
        (((made / "npy").as_uri(), True, own, chain), "its images are npy, which has no place for a C2PA"),
        (((tmp_path / "set").as_uri(), True, own, chain), "is a data set; --c2pa-key signs"),
    ]
    for (uri, unpack, key, certificates), said in cases:
        with pytest.raises(UserError, match=said) as refused:
            run(uri, str(out), unpack, False, key, certificates)
        assert "\n" not in str(refused.value)
        assert not out.exists()
    monkeypatch.setitem(__import__("sys").modules, "c2pa", None)
    with pytest.raises(UserError, match=r"pip install 'ddpm-pipeline\[c2pa\]'"):
        run(source, str(out), True, False, own, chain)


def test_signed_and_unsigned_images_do_not_share_a_folder(made: Path, tmp_path: Path, signer: Signer) -> None:
    download(made / "png", tmp_path / "out", signer)
    with pytest.raises(UserError, match=r"signed with the certificate .*; choose another folder"):
        run((made / "png").as_uri(), str(tmp_path / "out"), True)

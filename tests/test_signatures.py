"""Envelopes are DSSE, statements in-toto; only the holder of the key can make one, and the key stays where it is."""

import base64
import json
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from typer.testing import CliRunner

from ddpm_pipeline import signatures
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.jobs.cli import app
from ddpm_pipeline.signatures import PublicKey, SigningKey, Statement, open_envelope
from ddpm_pipeline.telemetry.redaction import redact

SHA = "ab" * 32


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return SigningKey.create(tmp_path / "signing.pem")


def statement() -> Statement:
    return Statement.about({"manifest.json": SHA}, "urn:test", {"count": 3})


def test_what_is_signed_is_the_encoding_of_the_dsse_specification() -> None:
    # the example of its protocol.md
    encoded = signatures._authenticated("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_an_envelope_holds_an_in_toto_statement_and_is_the_same_each_time(key: SigningKey) -> None:
    data = key.sign(statement())
    assert data == key.sign(statement())
    envelope = json.loads(data)
    payload = base64.b64decode(envelope["payload"])
    assert json.loads(payload) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "manifest.json", "digest": {"sha256": SHA}}],
        "predicateType": "urn:test",
        "predicate": {"count": 3},
    }
    said = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload)
    key.public.key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), said)
    assert open_envelope(data, key.public, "x") == statement()


def test_every_changed_byte_of_an_envelope_is_found(key: SigningKey) -> None:
    data = key.sign(statement())
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        with suppress(DamageError):
            # what is still accepted: the key's id is a hint, and the last character of base64 has spare bits
            assert open_envelope(bytes(changed), key.public, "x") == statement(), place


def test_another_key_and_another_type_are_told_apart(key: SigningKey, tmp_path: Path) -> None:
    other = SigningKey.create(tmp_path / "other.pem")
    with pytest.raises(DamageError, match=f"is signed by {other.public.key_id[:16]}…, not by "):
        open_envelope(other.sign(statement()), key.public, "x")
    stolen = json.loads(other.sign(statement()))
    stolen["signatures"][0]["keyid"] = key.public.key_id
    with pytest.raises(DamageError, match=r"its content is not what key \w{16}… has signed"):
        open_envelope(json.dumps(stolen).encode(), key.public, "x")


def test_a_private_key_file_is_the_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "signing.pem"
    made = SigningKey.create(file)
    assert file.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("DDPM_SIGNING_KEY_FILE", str(file))
    configured = SigningKey.configured()
    assert configured is not None
    assert configured.public.key_id == made.public.key_id
    file.chmod(0o640)
    with pytest.raises(UserError, match=f"others can read this private key; run chmod 600 {file}"):
        SigningKey.configured()
    with pytest.raises(UserError, match="File exists"):
        SigningKey.create(file)


def test_a_key_from_a_variable_is_masked_in_logs_and_cannot_be_sent(
    key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (tmp_path / "signing.pem").read_text()
    monkeypatch.delenv("DDPM_SIGNING_KEY_FILE", raising=False)
    monkeypatch.setenv("DDPM_SIGNING_KEY", text)
    configured = SigningKey.configured()
    assert configured is not None
    assert configured.public.key_id == key.public.key_id
    body = text.splitlines()[1]
    assert body not in redact(f"env {text}")
    assert redact({"DDPM_SIGNING_KEY": body}) == {"DDPM_SIGNING_KEY": "[redacted]"}
    with pytest.raises(TypeError, match="stays in its process"):
        pickle.dumps(key)
    assert body not in repr(key)


@pytest.mark.parametrize("text", ["no key", "", "A" * 60])
def test_what_is_no_key_is_refused_in_a_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="neither the file of a public key nor its line"):
        PublicKey.read(text)
    curve = generate_private_key(SECP256R1())
    pem = curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    monkeypatch.setenv("DDPM_SIGNING_KEY", pem)
    with pytest.raises(UserError, match="DDPM_SIGNING_KEY: is no Ed25519 key"):
        SigningKey.configured()
    public = tmp_path / "curve.pub"
    public.write_bytes(curve.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(UserError, match="is no Ed25519 key"):
        PublicKey.read(str(public))


def test_the_command_line_makes_a_key_and_shows_its_public_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, run = tmp_path / "signing.pem", CliRunner().invoke
    made = run(app, ["keys", "create", str(file)])
    assert made.exit_code == 0
    assert f"export DDPM_SIGNING_KEY_FILE={file}" in made.stdout
    secret = file.read_text().splitlines()[1]
    monkeypatch.setenv("DDPM_SIGNING_KEY_FILE", str(file))
    shown = [run(app, ["keys", "show", *words, "--json"]) for words in ([], [str(file)], [f"{file}.pub"])]
    assert all(one.exit_code == 0 and secret not in one.stdout for one in [made, *shown])
    first, *others = [json.loads(one.stdout) for one in shown]
    assert others == [first, first]
    assert PublicKey.read(first["public"]).key_id == first["key_id"]
    assert run(app, ["keys", "create", str(file)]).exit_code == 2

"""Users of the S3 gateway (JuiceFS's, which is MinIO's) with a policy each.

    python -m ddpm_pipeline.infra.s3_users POLICY KEYS ...

POLICY is a policy file, KEYS a file in the form of ~/.aws/credentials with the user's own keys. The pair may be
repeated. The gateway's keys (AWS_SHARED_CREDENTIALS_FILE) create the users and need not be known to anybody else.
"""

import configparser
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode

import requests
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.session import Session
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from ddpm_pipeline.errors import UserError

_TIMEOUT_SECONDS = 30.0


def make_user(endpoint: str, own: Credentials, keys: Credentials, policy_name: str, policy: str) -> None:
    """Create a user with `keys` on the gateway at `endpoint`, limited to the policy. Raises UserError when refused."""
    user = json.dumps({"status": "enabled", "secretKey": keys.secret_key}).encode()
    _put(endpoint, own, "add-canned-policy", {"name": policy_name}, policy.encode())
    _put(endpoint, own, "add-user", {"accessKey": keys.access_key}, _sealed(user, own.secret_key))
    whose = {"userOrGroup": keys.access_key, "isGroup": "false", "policyName": policy_name}
    _put(endpoint, own, "set-user-or-group-policy", whose, b"")


def read_keys(path: Path) -> Credentials:
    """The keys of a file's default profile. Raises UserError where it has none."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text())
        found = parser["default"]
        return Credentials(found["aws_access_key_id"], found["aws_secret_access_key"])
    except (OSError, KeyError, configparser.Error):
        raise UserError(f"{path}: no keys under [default], as in ~/.aws/credentials") from None


def main(argv: list[str]) -> int:
    """A user for each pair of files; 2 and one line where one cannot be made."""
    try:
        own, endpoint = Session().get_credentials(), os.environ.get("AWS_ENDPOINT_URL", "")
        if own is None or not endpoint or not argv or len(argv) % 2:
            raise UserError("needs AWS_ENDPOINT_URL, the gateway's own keys, and pairs of POLICY KEYS")
        for policy, keys in zip(argv[::2], argv[1::2], strict=True):
            name = Path(policy).stem
            make_user(endpoint, own, read_keys(Path(keys)), name, Path(policy).read_text())
            print(f"user with policy {name}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _put(endpoint: str, own: Credentials, call: str, query: Mapping[str, str], body: bytes) -> None:
    url = f"{endpoint.rstrip('/')}/minio/admin/v3/{call}?{urlencode(query)}"
    request = AWSRequest("PUT", url, data=body, headers={"Content-Type": "application/octet-stream"})
    S3SigV4Auth(own, "s3", os.environ.get("AWS_REGION", "us-east-1")).add_auth(request)
    try:
        answer = requests.put(url, body, headers=dict(request.headers), timeout=_TIMEOUT_SECONDS)
    except requests.RequestException as error:
        raise UserError(f"{endpoint} does not answer {call} ({type(error).__name__})") from None
    if answer.status_code != 200:
        raise UserError(
            f"{endpoint} refuses {call} with {answer.status_code}: is it the gateway, and are the keys its own?"
        )


def _sealed(payload: bytes, secret: str) -> bytes:
    """The form in which MinIO's administration takes secrets: sealed by a key made of the sender's own.

    Salt, a byte for the cipher (0: AES-256-GCM), eight bytes of nonce, then one piece of at most 16 KiB,
    marked as last.
    """
    salt, nonce = os.urandom(32), os.urandom(8)
    key = Argon2id(salt=salt, length=32, iterations=1, lanes=4, memory_cost=65536).derive(secret.encode())
    cipher = AESGCM(key)
    mark = b"\x80" + cipher.encrypt(nonce + bytes(4), b"", None)
    return salt + b"\0" + nonce + cipher.encrypt(nonce + (1).to_bytes(4, "little"), payload, mark)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

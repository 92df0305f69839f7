"""The variables and files that configure an S3 client; without boto3, whose import takes a third of a second."""

import os
from pathlib import Path

ADDRESSING_VARIABLE = "DDPM_S3_ADDRESSING_STYLE"
"""`path`, `virtual` or `auto`; before `addressing_style` of the AWS config, for which AWS has no variable."""
LOCATION_VARIABLES = (
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_REGION",
    ADDRESSING_VARIABLE,
)
"""Those that say where S3 is, each by itself."""
CONFIG_FILES = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}
"""Variables that name AWS's files, and where these are otherwise."""
CLIENT_VARIABLES = (
    *LOCATION_VARIABLES,
    *CONFIG_FILES,
    "AWS_ACCESS_KEY_ID",
    "AWS_CA_BUNDLE",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
"""Those that a client depends on: where one of them has changed, another client is made."""


def may_name_s3() -> bool:
    """Whether a variable or one of AWS's files may say where S3 is."""
    files = [Path(os.environ.get(name, default)) for name, default in CONFIG_FILES.items()]
    return bool(os.environ.keys() & LOCATION_VARIABLES) or any(file.expanduser().exists() for file in files)

#!/bin/sh
# Make the secrets of compose.yaml, each in a file of its own under infra/docker/secrets; those that exist stay.
# The containers run as user 1000, who must be able to read them: run this as that user, or as root.
set -eu
umask 077
cd "$(dirname "$0")"
user=$(id -u)
if [ "$user" != 1000 ] && [ "$user" != 0 ]; then
    echo "error: user $user: the containers could not read the files; run this with sudo" >&2
    exit 2
fi
mkdir -p secrets
word() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
make() { # make FILE CONTENT: unless it is there
    [ -e "secrets/$1" ] && return
    printf '%s' "$2" > "secrets/$1.new"
    [ "$user" = 1000 ] || chown 1000:1000 "secrets/$1.new"
    chmod 0400 "secrets/$1.new"
    mv "secrets/$1.new" "secrets/$1"
    echo "made secrets/$1"
}
make s3-access-key "$(word | cut -c 1-20)"
make s3-secret-key "$(word)"
make postgres-password "$(word)"
make mlflow-password "$(word)"
make mlflow-flask-key "$(word)"
make ray-token "$(word)"
make pgpass "postgres:5432:*:mlflow:$(cat secrets/postgres-password)
"
make aws-credentials "[default]
aws_access_key_id = $(cat secrets/s3-access-key)
aws_secret_access_key = $(cat secrets/s3-secret-key)
"
[ "$user" = 1000 ] || chown 1000:1000 secrets

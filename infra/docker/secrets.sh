#!/bin/sh
# Make the secrets of compose.yaml, each in a file of its own under infra/docker/secrets; those that exist stay.
# secrets.sh user NAME ROLE: let somebody into MLflow (viewer, logger, registrar or admin); prints the new password once.
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
random_hex() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
make() { # make FILE CONTENT: unless FILE exists
    [ -e "secrets/$1" ] && return
    printf '%s' "$2" > "secrets/$1.new"
    [ "$user" = 1000 ] || chown 1000:1000 "secrets/$1.new"
    chmod 0400 "secrets/$1.new"
    mv "secrets/$1.new" "secrets/$1"
    echo "made secrets/$1"
}
keys() { # keys NAME: S3 keys of a user of this name
    printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$1" "$(random_hex)"
}
line() { # line NAME ROLE PASSWORD: one of MLflow's users, as infra/tracking/access.py reads them
    printf '%s %s %s\n' "$1" "$2" "$(printf '%s' "$3" | sha256sum | cut -c 1-64)"
}
if [ "${1:-}" = user ]; then
    case "${2:-}" in "" | *[!A-Za-z0-9_.@-]*) echo "error: user NAME ROLE: a name of letters and digits" >&2; exit 2 ;; esac
    case "${3:-}" in viewer | logger | registrar | admin) ;; *) echo "error: user NAME ROLE: viewer, logger, registrar or admin" >&2; exit 2 ;; esac
    password=$(random_hex)
    users=$(grep -v "^$2 " secrets/mlflow-users || true; line "$2" "$3" "$password")
    rm secrets/mlflow-users
    make mlflow-users "$users
"
    echo "password of $2: $password   (docker compose restart mlflow lets them in)"
    exit
fi
make s3-access-key "$(random_hex | cut -c 1-20)"
make s3-secret-key "$(random_hex)"
make postgres-password "$(random_hex)"
make mlflow-password "$(random_hex)"   # of MLflow's user admin: for people, given to no container
make mlflow-ray "$(random_hex)"
make ray-token "$(random_hex)"
make mlflow-users "$(line admin admin "$(cat secrets/mlflow-password)"; line ray registrar "$(cat secrets/mlflow-ray)")
"
make pgpass "postgres:5432:*:mlflow:$(cat secrets/postgres-password)
"
make aws-credentials "[default]
aws_access_key_id = $(cat secrets/s3-access-key)
aws_secret_access_key = $(cat secrets/s3-secret-key)
"
make aws-ray "$(keys ray)"
make aws-mlflow "$(keys mlflow)"
[ "$user" = 1000 ] || chown 1000:1000 secrets

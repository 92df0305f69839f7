#!/usr/bin/env bash
# Rewrite the lock files from pyproject.toml:  infra/lock.sh [UV-OPTION...]   (make lock)
# What is pinned stays pinned where pyproject.toml lets it; --upgrade takes the newest of all. uv asks the package
# index for every file of each release, so that the hashes are those of all platforms and Pythons.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
draft=$(mktemp -d)
trap 'rm -rf "$draft"' EXIT

compile() { # compile NAME OPTION...: resolves into $draft/NAME
    cat requirements.lock requirements-dev.lock requirements-torch.lock | grep -v '^-r' >"$draft/$1"
    "$uv" pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
        --quiet --output-file "$draft/$1" "${@:2}"
}

# keep PATTERN FILE: the pins of FILE with their hashes, but not those of other systems or whose name matches PATTERN.
keep() {
    awk -v pattern="$1" '/^[a-z]/ { skip = $0 ~ pattern || /sys_platform == .(win32|emscripten)/ } !skip' "$2"
}

cuda='^(nvidia-[^m]|cuda-)' # what a CUDA build of torch brings, but not nvidia-ml-py
torch="^(torch==|triton==)|$cuda"
head='# Written by `make lock`; do not edit.'
compile runtime --extra stack "$@"
compile dev --extra stack --extra dev --extra hf --extra c2pa --constraint "$draft/runtime" "$@"
{ echo "$head"; keep "$torch" "$draft/runtime"; } >"$draft/requirements.lock"
names=$(sed -n 's/^\([a-z0-9-]*\)==.*/\1/p' "$draft/requirements.lock" | paste -sd '|')
{
    echo "$head"
    echo "-r requirements.lock"
    keep "^torch==|$cuda|^($names)==" "$draft/dev" # with triton, in the version that torch asks for
} >"$draft/requirements-dev.lock"
{
    echo "$head"
    echo "# torch has no hashes here: which build of this version is right depends on the machine (CUDA, or a CPU build from"
    echo "# another index or disk), and each is another file. A CUDA build names its own nvidia-* packages, by exact version."
    sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$draft/runtime"
} >"$draft/requirements-torch.lock"
mkdir -p "$draft/infra/docker"
named() { # named LOCK PIN...: these packages and what they need
    cp "$1" "$draft/named"
    printf '%s\n' "${@:2}" | "$uv" pip compile - --universal --python-version 3.11 --generate-hashes --no-annotate \
        --no-header --quiet --output-file "$draft/named"
    { echo "$head"; cat "$draft/named"; } >"$draft/$1"
}
named infra/docker/mlflow.lock psycopg2-binary==2.9.11                                  # the driver of a team's database
# the tools of infra/supply.sh
named infra/supply.lock cyclonedx-bom==7.5.0 latex2mathml==3.81.1 mkdocs-material==9.8.2 pip-audit==2.10.1 pip-licenses==5.5.5
for lock in infra/docker/mlflow.lock infra/supply.lock requirements.lock requirements-dev.lock requirements-torch.lock; do
    cp "$draft/$lock" "$lock"
    echo "$lock: $(grep -c '^[a-z].*==' "$lock") packages"
done

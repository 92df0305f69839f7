#!/usr/bin/env bash
# Make .venv match the lock files:  infra/install.sh runtime|dev
# Does nothing when it already does: the locks are compared with those of the last installation.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-runtime}
venv=.venv

fail() { echo "error: $*" >&2; exit 2; }

is_new_enough() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 to 3.13 found (tried: ${PYTHON:-python3 python3.13 python3.12 python3.11}):" \
        "install one, or name it: make PYTHON=/path/to/python3.12"
}

make_venv() {
    local python
    if [ -x $venv/bin/python ] && is_new_enough $venv/bin/python && $venv/bin/python -m pip --version >/dev/null 2>&1
    then
        return
    fi
    python=$(find_python)
    echo "Making $venv with $("$python" --version)"
    rm -rf $venv
    if ! "$python" -m venv $venv >$venv.log 2>&1; then
        rm -rf $venv
        fail "$python cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv);" \
            "see $venv.log, which ends: $(tail -n 1 $venv.log)"
    fi
    rm -f $venv.log
}

# install_lock LOCK OPTION...: what the lock names, unless the very same lock was installed before.
install_lock() {
    local lock=$1 stamp=$venv/installed-$1 count
    cmp -s "$lock" "$stamp" && return
    count=$(grep -c '^[a-z].*==' "$lock")
    echo "Installing $count packages of $lock into $venv (minutes at the first time; torch is the largest)"
    $venv/bin/python -m pip install --disable-pip-version-check --no-input "${@:2}" -r "$lock"
    cp "$lock" "$stamp"
}

# Only files whose sha256 is in the lock, and no others; then torch, for which see its lock.
install_runtime() {
    install_lock requirements.lock --require-hashes --no-deps
    install_lock requirements-torch.lock
}

# The project itself, editable, so that the code that runs is this checkout's.
install_project() {
    local stamp=$venv/installed-pyproject.toml
    cmp -s pyproject.toml "$stamp" && [ -x $venv/bin/ddpm ] && return
    $venv/bin/python -m pip install --disable-pip-version-check --no-input --quiet \
        --no-deps --no-build-isolation --editable .
    cp pyproject.toml "$stamp"
}

case $what in
    runtime) make_venv; install_runtime ;;
    dev) make_venv; install_runtime; install_lock requirements-dev.lock --require-hashes --no-deps ;;
    *) fail "infra/install.sh takes runtime or dev, not '$what'" ;;
esac
install_project

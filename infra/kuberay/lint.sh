#!/usr/bin/env bash
# A linter's judgement of the manifests, every pod template made a pod. checkov gets a virtual environment of its own.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=3.3.30
tools=.supply/checkov-$version
if [ ! -x $tools/bin/checkov ]; then
    .venv/bin/python -m venv --clear $tools
    $tools/bin/python -m pip install --disable-pip-version-check --no-input --quiet checkov==$version
fi
rm -rf build/manifests
.venv/bin/python -m tests.manifests.lint build/manifests
$tools/bin/checkov --directory build/manifests --config-file infra/kuberay/checkov.yaml

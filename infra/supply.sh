#!/usr/bin/env bash
# What the program is made of:  infra/supply.sh sbom|licenses|audit|site
# sbom: build/sbom.cdx.json (CycloneDX).  licenses: docs/licenses.md.  audit: known weaknesses of what the lock pins.
# site: the documentation as HTML, build/site.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=.supply
locks="requirements.lock requirements-torch.lock"
wanted=infra/supply.lock  # in a virtual environment of their own: nothing here is needed to run or test the program

install_tools() {
    cmp -s $wanted $tools/installed && return
    .venv/bin/python -m venv --clear $tools
    $tools/bin/python -m pip install --disable-pip-version-check --no-input --quiet --require-hashes --no-deps -r $wanted
    cp $wanted $tools/installed
}

sbom() {
    mkdir -p build
    # shellcheck disable=SC2086  (one argument per file)
    cat $locks >build/requirements.txt
    # pyproject.toml leaves the version to the package
    version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' pipeline/__init__.py)
    sed "s/^dynamic = .*/version = \"$version\"/" pyproject.toml >build/pyproject.toml
    $tools/bin/cyclonedx-py requirements build/requirements.txt --pyproject build/pyproject.toml --output-reproducible --validate \
        --output-file build/sbom.cdx.json
    echo "sbom     build/sbom.cdx.json"
}

licenses() {
    local names
    # shellcheck disable=SC2086
    names=$(sed -n 's/^\([a-z][^=]*\)==.*/\1/p' $locks)
    {
        echo "# Licenses of what is installed"
        echo
        echo "*Written by \`make licenses\` from the packages that \`requirements.lock\` and \`requirements-torch.lock\` pin, as their own metadata tell it (UNKNOWN: it"
        echo "tells none). This program's own Debian and CUDA layers, in containers, come under their own.*"
        echo
        # shellcheck disable=SC2086  (one argument per package)
        $tools/bin/pip-licenses --python=.venv/bin/python --format=markdown --from=mixed --with-system --packages $names |
            sed -E 's/ +\|/ |/g; s/\|-+/|---/g'
    } >docs/licenses.md
    echo "licenses docs/licenses.md"
}

audit() {
    # asks the package index for advisories; strict, or a package that it does not know would pass for a sound one
    local lock
    for lock in $locks; do
        $tools/bin/pip-audit --requirement "$lock" --no-deps --disable-pip --strict --desc on
    done
}

site() {
    NO_MKDOCS_2_WARNING=1 $tools/bin/mkdocs build --clean  # not --quiet: a warning that is not logged fails no strict build
    echo "site     build/site/index.html"
}

case ${1:-} in
sbom | licenses | audit | site) install_tools && "$1" ;;
*) echo "usage: infra/supply.sh sbom|licenses|audit|site" >&2 && exit 2 ;;
esac

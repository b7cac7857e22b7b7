#!/usr/bin/env bash
# Build the wheel, install it alone into a fresh environment, and use it from a folder that does not hold the source.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

"$root/.venv/bin/python" -m build --wheel --outdir "$work/dist" "$root" >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$root/constraints.txt" "$work"/dist/*.whl
cd "$work"
"$work/venv/bin/python" "$root/.ci/wheel_smoke_test.py"
"$work/venv/bin/ehrseq" --version
echo "wheel smoke test: passed"

#!/usr/bin/env bash
# Build the wheel with a C++ compiler and without one, install each alone into one fresh environment, and use it from a
# folder that does not hold the source; then once more with the compiled library deleted.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

build() { # build FOLDER [NAME=VALUE ...]: the wheel, into $work/FOLDER
  env "${@:2}" "$root/.venv/bin/python" -m build --wheel --outdir "$work/$1" "$root" >"$work/build.log" 2>&1 ||
    { cat "$work/build.log"; exit 1; }
}
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
use() { (cd "$work" && "$work/venv/bin/python" "$root/.ci/wheel_smoke_test.py" "$@"); }

python3 -m venv "$work/venv"

build without_compiler CXX=/nonexistent/compiler
ls "$work"/without_compiler/ehrseq-*-py3-none-any.whl
pip --constraint "$root/constraints.txt" "$work"/without_compiler/*.whl
use torch
"$work/venv/bin/ehrseq" --version

if command -v g++ >/dev/null || command -v clang++ >/dev/null; then
  build with_compiler
  ls "$work"/with_compiler/ehrseq-*-py3-none-linux_*.whl
  pip --force-reinstall --no-deps "$work"/with_compiler/*.whl
  use cpp
  rm "$work"/venv/lib/python3*/site-packages/ehrseq/kernels/lib/*.so
  use torch
fi
echo "wheel smoke test: passed"

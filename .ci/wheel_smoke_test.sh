#!/usr/bin/env bash
# Build the wheel with a C++ compiler and without one, install each alone into a fresh environment with what it declares,
# and use it from a folder that does not hold the source; then once more with the compiled library deleted.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

build() { # build NAME [VARIABLE=VALUE ...]: the wheel in $work/NAME, an environment with it in $work/NAME/env
  env "${@:2}" "$root/.venv/bin/python" -m build --wheel --outdir "$work/$1" "$root" >"$work/$1.log" 2>&1 ||
    { cat "$work/$1.log"; exit 1; }
  "$root/.venv/bin/python" "$root/.ci/wheel_smoke_test_environment.py" "$work/$1/env" "$work/$1"/*.whl
}
use() { # use NAME BACKEND
  (cd "$work" && "$work/$1/env/bin/python" "$root/.ci/wheel_smoke_test.py" "$2")
}

without_compiler() {
  build without CXX=/nonexistent/compiler
  ls "$work"/without/ehrseq-*-py3-none-any.whl
  use without torch
  "$work/without/env/bin/ehrseq" --version
}

with_compiler() {
  build with
  ls "$work"/with/ehrseq-*-py3-none-linux_*.whl
  use with cpp
  rm "$work"/with/env/lib/python3*/site-packages/ehrseq/kernels/lib/*.so
  use with torch
}

without_compiler &
first=$!
if command -v g++ >/dev/null || command -v clang++ >/dev/null; then
  with_compiler
fi
wait "$first"
echo "wheel smoke test: passed"

#!/usr/bin/env bash
# Build the wheel, install it alone into a fresh environment with what it declares, and use it from a folder that does not
# hold the source; then ask once more with the compiled library deleted. Where the kernels, the packaging or this test
# changed, or nobody can tell, a wheel built without a compiler goes the same way.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
concerned=(.ci ehrseq/kernels hatch_build.py pyproject.toml constraints.txt)

landed() { # the commit whose wheel was tested: where this branch left origin/main; on main itself, its state a day ago,
  # since what came later may be what is tested here
  local head base
  head="$(git rev-parse HEAD)" || return
  base="$(git merge-base HEAD origin/main 2>/dev/null || echo "$head")"
  [ "$base" != "$head" ] || base="$(git rev-list -1 --before="$(($(git show -s --format=%ct HEAD) - 86400))" HEAD)"
  echo "$base"
}
changed() {
  local base
  base="$(cd "$root" && landed 2>/dev/null)" || return 0
  [ -z "$base" ] || ! git -C "$root" diff --quiet "$base" -- "${concerned[@]}"
}
build() { # build NAME [VARIABLE=VALUE ...]: the wheel in $work/NAME, an environment with it in $work/NAME/env
  # with what .venv has to build with: that what pyproject.toml asks for is enough, `make install` has shown
  env "${@:2}" "$root/.venv/bin/python" -m build --wheel --no-isolation --outdir "$work/$1" "$root" >"$work/$1.log" 2>&1 ||
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
  "$work/with/env/bin/ehrseq" doctor | grep -E "^(scan|conv): torch"
}

compiler=""
command -v g++ >/dev/null || command -v clang++ >/dev/null || compiler=none
if [ "$compiler" = none ] || changed; then
  without_compiler &
  first=$!
fi
if [ "$compiler" != none ]; then
  with_compiler
fi
[ -z "${first:-}" ] || wait "$first"
echo "wheel smoke test: passed"

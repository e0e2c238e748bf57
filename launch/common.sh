# Shared by the scripts in launch/: the set-up, and the exit code of a training job. Sourced, not run.
#
#   GPTDIST_VENV   where the virtual environment goes (default: .venv in the project)
#   PYTHON         the interpreter it is made from (default: python3; 3.11 or newer)
#   GPTDIST_CUDA, GPTDIST_CUDA_ARCHS, CXX, CUDA_HOME   how the libraries are built: see setup.py

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${GPTDIST_VENV:-$ROOT/.venv}"
CONSTRAINTS="$ROOT/launch/constraints.txt"

die() { echo "${0##*/}: $1" >&2; exit "${2:-3}"; }

gpu_visible() { nvidia-smi -L 2> /dev/null | grep -q "^GPU"; }

# build_settings: all but the sources that decides what the build makes, in one line.
build_settings() {
  echo "CXX=${CXX:-} CUDA_HOME=${CUDA_HOME:-} nvcc=$(command -v nvcc || true) GPTDIST_CUDA=${GPTDIST_CUDA:-}" \
    "GPTDIST_CUDA_ARCHS=${GPTDIST_CUDA_ARCHS:-} GPTDIST_PTXVM=${GPTDIST_PTXVM:-}"
}

# built_enough STAMP: the last build was of these sources, and made all that is wanted now, or more.
built_enough() {
  local last="$VENV/.gptdist-build" stamp="" settings=""
  { read -r stamp && read -r settings; } 2> /dev/null < "$last" || return 1
  [ "$stamp" = "$1" ] || return 1
  if [ "${GPTDIST_CUDA:-}" = 0 ] && [ "${GPTDIST_PTXVM:-}" != 1 ]; then return 0; fi  # every build makes the C++ library
  if [ "${GPTDIST_PTXVM:-}" = 1 ] && [ ! -f gptdist/_ptxvm.so ]; then return 1; fi  # a build by hand took it away
  [ "$settings" = "$(build_settings)" ] || [ "$settings" = "$(GPTDIST_PTXVM=1 build_settings)" ]
}

# set_up EXTRAS: virtual environment, packages, libraries. Does nothing when nothing has changed since the last time.
set_up() {
  local extras="$1" python="${PYTHON:-python3}" stamp installed
  cd "$ROOT"
  if [ ! -x "$VENV/bin/python" ]; then
    command -v "$python" > /dev/null || die "no $python here: install Python 3.11 or newer, or set PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      || die "$("$python" --version 2>&1) is too old: install Python 3.11 or newer, or set PYTHON"
    echo "making $VENV"
    "$python" -m venv "$VENV" || die "cannot make $VENV: is the venv module there (Debian: apt-get install python3-venv)?"
  fi
  export PATH="$VENV/bin:$PATH"
  stamp="$({ cat setup.py pyproject.toml "$CONSTRAINTS"; find csrc -type f -print0 | LC_ALL=C sort -z | xargs -0 cat; } \
    | sha256sum | cut -d' ' -f1)"
  if built_enough "$stamp"; then
    for installed in "$extras" test,deepspeed; do  # the tests' packages are all the others' and more
      if [ "$(cat "$VENV/.gptdist-$installed" 2> /dev/null)" = "$stamp" ]; then return; fi
    done
  fi
  echo "installing packages (the first time this downloads torch)"
  rm -f "$VENV/.gptdist-build"
  # torch and the build tools first: the libraries are compiled against the torch that will load them.
  "$VENV/bin/python" -m pip install -q -c "$CONSTRAINTS" torch setuptools wheel ninja pybind11 numpy
  "$VENV/bin/python" -m pip install -q -c "$CONSTRAINTS" --no-build-isolation -e ".${extras:+[$extras]}"
  echo "$stamp" > "$VENV/.gptdist-$extras"
  printf '%s\n' "$stamp" "$(build_settings)" > "$VENV/.gptdist-build"
}

# job_exit_code RUN_DIR FALLBACK: the code a failed worker recorded (torchrun turns every failure into 1).
job_exit_code() {
  python - "$1/exit.json" "$2" <<'PY'
import json, pathlib, sys
path, fallback = pathlib.Path(sys.argv[1]), int(sys.argv[2])
try:
    print(json.loads(path.read_text())["code"] or fallback)
except (OSError, ValueError):
    print(fallback)
PY
}

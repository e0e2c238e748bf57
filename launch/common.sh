# Shared by the scripts in launch/: the set-up, and the exit code of a training job. Sourced, not run.
#
#   GPTDIST_VENV   where the virtual environment goes (default: .venv in the project)
#   PYTHON         the interpreter it is made from (default: python3; 3.11 or newer)

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${GPTDIST_VENV:-$ROOT/.venv}"
CONSTRAINTS="$ROOT/launch/constraints.txt"

die() { echo "${0##*/}: $1" >&2; exit "${2:-3}"; }

# set_up EXTRAS: virtual environment, packages, extension. Does nothing when nothing has changed since the last time.
set_up() {
  local extras="$1" python="${PYTHON:-python3}" stamp done
  cd "$ROOT"
  if [ ! -x "$VENV/bin/python" ]; then
    command -v "$python" > /dev/null || die "no $python here: install Python 3.11 or newer, or set PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      || die "$("$python" --version 2>&1) is too old: install Python 3.11 or newer, or set PYTHON"
    echo "making $VENV"
    "$python" -m venv "$VENV" || die "cannot make $VENV: is the venv module there (Debian: apt-get install python3-venv)?"
  fi
  export PATH="$VENV/bin:$PATH"
  stamp="$({ echo "${CXX:-}"; cat setup.py pyproject.toml "$CONSTRAINTS"; find csrc -type f -exec cat {} +; } \
    | sha256sum | cut -d' ' -f1)"
  for done in "$extras" test,deepspeed; do  # the tests' set-up holds all the others
    if [ "$(cat "$VENV/.gptdist-$done" 2> /dev/null)" = "$stamp" ]; then return; fi
  done
  echo "installing packages (the first time this downloads torch)"
  # torch and the build tools first: the extension is compiled against the torch that will load it.
  "$VENV/bin/python" -m pip install -q -c "$CONSTRAINTS" torch setuptools wheel ninja pybind11 numpy
  "$VENV/bin/python" -m pip install -q -c "$CONSTRAINTS" --no-build-isolation -e ".${extras:+[$extras]}"
  echo "$stamp" > "$VENV/.gptdist-$extras"
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

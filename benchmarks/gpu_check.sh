#!/usr/bin/env bash
# On a machine with a GPU: build the CUDA kernels for it, check them against the reference, time them beside PyTorch,
# train GPT-2 with them for a few steps.
#   bash benchmarks/gpu_check.sh
# Needs nvcc and a python3 that has a CUDA build of torch >= 2.11: no network, no virtual environment. Writes
# gpu_check.md and gpu_check.json. Exit code 1: a check failed, 3: no GPU, or no nvcc.
#   PYTHON   the interpreter (default: python3)       OUT   where results go (default: benchmarks/results)
#   BUDGET   seconds for all of it, the build included (default: 525); what does not fit is cut, and the report says so
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
die() { echo "gpu_check: $1" >&2; exit 3; }

command -v "$python" > /dev/null || die "no $python here (set PYTHON)"
arch="$("$python" - <<'PY'
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"gpu_check: {sys.executable} has no torch ({error})")
if torch.version.cuda is None:
    sys.exit(f"gpu_check: no GPU: torch {torch.__version__} is built without CUDA")
if not torch.cuda.is_available():
    sys.exit("gpu_check: no GPU: torch sees no CUDA device")
major, minor = torch.cuda.get_device_capability()
if major < 8:
    sys.exit(f"gpu_check: {torch.cuda.get_device_name()} has compute capability {major}.{minor}, the kernels need 8.0")
print(f"{major}{minor}")
PY
)" || exit 3
nvcc="${CUDA_HOME:+$CUDA_HOME/bin/}nvcc"
command -v "$nvcc" > /dev/null || [ -x /usr/local/cuda/bin/nvcc ] || die "no nvcc: put it on PATH or set CUDA_HOME"

echo "building for sm_$arch"
GPTDIST_CUDA=1 GPTDIST_CUDA_ARCHS="$arch" "$python" setup.py -q build_ext --inplace
exec "$python" -m benchmarks.gpu_check --output "${OUT:-benchmarks/results}" --budget $((${BUDGET:-525} - SECONDS))

#!/usr/bin/env bash
# Set up and run the tests.   bash launch/test.sh          what CI runs
#                             bash launch/test.sh --all    the long ones too
# Other arguments go to pytest:   bash launch/test.sh -k checkpoint
# As many processes as processors, up to 8, share the modules; -n 0: one, which --pdb needs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

which=(-m "not long")
if [ "${1:-}" = "--all" ]; then which=(); shift; fi
export GPTDIST_PTXVM=1  # CUDA kernels are tested without a GPU, from their PTX
gpu_visible || export GPTDIST_CUDA_ARCHS="${GPTDIST_CUDA_ARCHS-ptx}"  # machine code that nothing here runs takes longest
set_up test,deepspeed
processes="$(nproc)"
exec python -m pytest -q -n "$((processes < 8 ? processes : 8))" --dist loadfile --no-loadscope-reorder "${which[@]}" "$@"

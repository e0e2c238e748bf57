#!/usr/bin/env bash
# Set up and run the tests.   bash launch/test.sh          what CI runs
#                             bash launch/test.sh --all    the long ones too
# Other arguments go to pytest:   bash launch/test.sh -k checkpoint
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

which=(-m "not long")
if [ "${1:-}" = "--all" ]; then which=(); shift; fi
set_up test,deepspeed
exec python -m pytest -q "${which[@]}" "$@"

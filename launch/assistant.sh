#!/usr/bin/env bash
# From nothing to an assistant in the browser: set up, train the base model of the quickstart, fine-tune it on questions
# about the names that Python programs use most, compare the two on questions in words that neither saw, serve. On 2
# cores of a Zen 3 server the base model took 246 s, fine-tuning and comparison 181 s: 61 of 100 questions are answered
# word by word, of the base model none. Run again, it goes on from what is done.
#
#   bash launch/assistant.sh              serves until Ctrl-C, and opens the page where there is a browser
#   bash launch/assistant.sh --no-serve   ends before that
#   PORT                                  where it listens (default: 8000)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DATA="data/embedded"
BASE="runs/quickstart"
RUN="runs/assistant"

case "${1:-}" in
  "" | --no-serve) ;;
  *) die "unknown argument $1: use --no-serve, or none" 2 ;;
esac

# run_job COMMAND CONFIG RUN_DIR [OVERRIDES]: on two processes.
run_job() {
  local command="$1" config="$2" run="$3"
  rm -f "$run/exit.json"  # what an earlier run left says nothing about this one
  torchrun --standalone --nproc-per-node 2 -m gptdist "$command" "$config" "--run.dir=$run" "${@:4}" || {
    code="$(job_exit_code "$run" $?)"
    die "$command ended with exit code $code" "$code"
  }
}

gpu_visible || export GPTDIST_CUDA="${GPTDIST_CUDA-0}"
set_up serve
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
started=$SECONDS

if [ ! -f "$DATA/report.json" ]; then
  gptdist prepare --input embedded --output "$DATA" --tokenizer bpe:512
fi
run_job train configs/quickstart.yaml "$BASE"
run_job finetune configs/assistant.yaml "$RUN"

printf '\n---- questions in other words, and about other names, than those it was trained on ----\n'
python -m benchmarks.assistant "$BASE" "$RUN"
printf '\ntime: %d s after the set-up\n\n' "$((SECONDS - started))"
if [ "${1:-}" = "--no-serve" ]; then exit 0; fi
open=()
if [ -n "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]; then open=(--open); fi
exec gptdist serve "$RUN" --port "${PORT:-8000}" "${open[@]}"

#!/usr/bin/env bash
# From nothing to a GPT that writes: set up, prepare the English that comes with Python, train on two processes under
# FSDP, stop half-way and resume, compare with a bigram model, plot, generate. About 3 minutes on 2 cores once the
# packages are there; run again, it goes on from what is done.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ $# -eq 0 ] || die "takes no arguments, and got: $*" 2
DATA="data/embedded"
RUN="runs/quickstart"
PROMPT="If the"

train() {
  rm -f "$RUN/exit.json"  # what an earlier run left says nothing about this one
  torchrun --standalone --nproc-per-node 2 -m gptdist train configs/quickstart.yaml "$@" || {
    code="$(job_exit_code "$RUN" $?)"
    die "training ended with exit code $code" "$code"
  }
}

gpu_visible || export GPTDIST_CUDA="${GPTDIST_CUDA-0}"
set_up ""
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
started=$SECONDS

if [ ! -f "$DATA/report.json" ]; then
  gptdist prepare --input embedded --output "$DATA" --tokenizer bpe:512
fi
train --train.stop_at=400   # stops on purpose, with a checkpoint ...
train                       # ... and goes on exactly where it was

report="$(gptdist evaluate "$RUN" --which best --bigram --json)"
field() { python -c 'import json, sys; print(json.loads(sys.argv[1])[sys.argv[2]])' "$report" "$1"; }
gptdist plot "$RUN" --baseline "$(field bigram_loss)" > /dev/null
sample="$(gptdist generate "$RUN" --which best --prompt "$PROMPT" --max-new-tokens 110 --temperature 0.6 --top-k 40 --seed 3)"

printf '\n---- a continuation of "%s" ----\n%s\n' "$PROMPT" "$sample"
printf '\n---- summary ----\n'
printf 'validation loss   %.3f nats per token\n' "$(field loss)"
printf 'bigram model      %.3f nats per token (best smoothing: %s)\n' "$(field bigram_loss)" "$(field bigram_smoothing)"
printf 'better by         %.3f nats per token\n' "$(field margin)"
printf 'loss curve        %s\n' "$RUN/loss.png"
printf 'checkpoints       %s\n' "$RUN/checkpoints"
printf 'time              %d s after the set-up\n' "$((SECONDS - started))"
python -c 'import sys; sys.exit(float(sys.argv[1]) < 0.2)' "$(field margin)" \
  || die "the model is less than 0.2 nats per token better than the bigram model: something is wrong" 1

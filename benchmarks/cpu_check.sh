#!/usr/bin/env bash
# On a quiet machine: all that is measured on a CPU, from the kernels to whole runs, beside the peers.
#   bash benchmarks/cpu_check.sh [STEP ...]     default: all, below
# Needs the environment of launch/test.sh, whose packages have the peers. Writes OUT/cpu-STEP.md. Some two hours on two
# cores; bf16 is measured where the processor multiplies it. Exit code 1: a step failed, or missed its target.
#   OUT            where results go (default: benchmarks/results)
#   GPTDIST_DATA   a directory with tinyshakespeare.txt, for the step shakespeare
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${GPTDIST_VENV:-.venv}/bin/python" out="${OUT:-benchmarks/results}"
die() { echo "cpu_check: $1" >&2; exit "$2"; }

all="kernels train generate precision scale shakespeare"
[ $# -gt 0 ] || set -- $all
for step in "$@"; do
  case " $all " in *" $step "*) ;; *) die "there is no step $step: expected some of $all" 2 ;; esac
done
case " $* " in *" shakespeare "*)
  text="${GPTDIST_DATA:-.}/tinyshakespeare.txt"
  [ -f "$text" ] || die "no $text here: set GPTDIST_DATA to its directory, or name the steps to take without shakespeare" 2 ;;
esac
[ -x "$python" ] || die "no $python here: bash launch/test.sh makes it, or set GPTDIST_VENV" 3
read -r load _ < /proc/loadavg
if [ "${load%.*}" -ge 1 ]; then echo "cpu_check: the load is $load: other processes will be in the figures" >&2; fi
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

measure() {
  case "$1" in
    kernels) "$python" -m benchmarks.kernels ;;
    train) "$python" -m benchmarks.train_cpu ;;
    generate) "$python" -m benchmarks.generate_cpu ;;
    precision)
      "$python" -m gptdist prepare --input embedded --output "$work/data" --tokenizer bpe:512 >&2 \
        && "$python" -m benchmarks.precision --data "$work/data" ;;
    scale) "$python" -m benchmarks.train_cpu_scale --output "$out/cpu-scale.md" ;;  # and its plots
    shakespeare) "$python" -m benchmarks.shakespeare ;;
  esac
}

failed=()
mkdir -p "$out"
for step in "$@"; do
  echo "$step: $(date +%T)" >&2
  measure "$step" > "$work/$step" || failed+=("$step")
  if [ "$step" != scale ] && [ -s "$work/$step" ]; then mv "$work/$step" "$out/cpu-$step.md"; fi
done
[ ${#failed[@]} -eq 0 ] || die "failed: ${failed[*]}" 1

#!/usr/bin/env bash
# One job on several nodes, which survives the loss of some.
#
#   On every node:    bash launch/multinode.sh --nodes 2 --endpoint node-1:29400 CONFIG [--section.key=value ...]
#   From one machine: bash launch/multinode.sh --hosts node-1,node-2 CONFIG [--section.key=value ...]
#   All options:      bash launch/multinode.sh --help
#
# --hosts takes names with commas, or a file like launch/hostfile.example (a host a line, "slots=8" its processes). It
# reaches them by $GPTDIST_SSH (default: ssh without passwords), expects this directory and the environment at the same
# paths there, and its exit code is the first host's, or that of the host which ended the job. Ctrl-C, SIGTERM or SIGUSR1
# here make all of them save and end.
# gptdist/launcher.py is a node's part: what is started again, what is not, and the exit codes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
SSH="${GPTDIST_SSH:-ssh -o BatchMode=yes -o ConnectTimeout=10}"

if [ -x "$VENV/bin/python" ]; then export PATH="$VENV/bin:$PATH"; fi

if [ "${1:-}" != --hosts ]; then
  command -v python > /dev/null || die "no python here, and no $VENV: see launch/README.md"
  python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' \
    || die "$(command -v python) of $(hostname) has no torch: install this project there, or set GPTDIST_VENV"
  exec python -m gptdist.launcher "$@"
fi

[ $# -ge 3 ] || die "usage: bash launch/multinode.sh --hosts HOSTS [options] CONFIG [--section.key=value ...]" 2
hosts=() slots=()
if [ -f "$2" ]; then
  while read -r name more || [ -n "$name" ]; do  # the last line may have no end
    case "$name" in "" | "#"*) continue ;; esac
    hosts+=("$name")
    case "$more" in *slots=*) more="${more#*slots=}"; slots+=("${more%%[^0-9]*}") ;; *) slots+=("") ;; esac
  done < "$2"
else
  IFS=, read -ra hosts <<< "$2"
fi
[ ${#hosts[@]} -gt 0 ] || die "--hosts $2 names no host: give names with commas, or a file with a host a line" 2
shift 2

# refuse MESSAGE: end with 2, also in RUN_DIR/exit.json.
refuse() {
  local code=0
  command -v python > /dev/null || die "$1" 2
  python -m gptdist.launcher --refuse "$1" "${given[@]}" || code=$?
  exit "$code"
}
given=("$@")
notes="$(mktemp -d)"  # by a host's number: why it cannot be reached, later its exit code
trap 'rm -rf "$notes"' EXIT
for i in "${!hosts[@]}"; do
  [[ "${hosts[$i]}" =~ ^[A-Za-z0-9_][A-Za-z0-9_.:@-]*$ ]] || refuse "--hosts: \"${hosts[$i]}\" is no name of a host"
  for other in "${hosts[@]:0:$i}"; do
    [ "${hosts[$i]}" != "$other" ] \
      || refuse "--hosts names ${hosts[$i]} twice: give it once, and its processes as slots=N or --processes-per-node N"
  done
done
for i in "${!hosts[@]}"; do  # all at once: each may take its 10 s
  { $SSH "${hosts[$i]}" true > "$notes/$i" 2>&1 < /dev/null && rm "$notes/$i"; } &
done
wait
for i in "${!hosts[@]}"; do
  [ ! -e "$notes/$i" ] || refuse "cannot reach host ${hosts[$i]}: $(grep . "$notes/$i" || echo "\"$SSH ${hosts[$i]} \
true\" failed"): check its name, and that ssh needs no password"
done

# An open pipe is every node's input: its end, also by this machine's death, is their signal to save and end.
pipe="$(mktemp -u)"
mkfifo "$pipe"
exec {hold}<> "$pipe" {input}< "$pipe"
rm -f "$pipe"
stop() { if [ -n "$hold" ]; then exec {hold}>&-; hold=""; fi; }
trap stop TERM INT HUP USR1
settings=()
for name in $(compgen -e); do
  case "$name" in *_KEY | *_TOKEN | *_SECRET | *_PASSWORD) continue ;; esac  # command lines are for all to see
  case "$name" in NCCL_* | GLOO_* | GPTDIST_* | OMP_NUM_THREADS) settings+=("$name=${!name}") ;; esac
done

# A host that cannot begin, or ends the job, ends it for all: some may still wait for it to come.
run_node() {
  local code=0
  $SSH "$1" "$2" <&"$input" || code=$?
  case "$code" in 126 | 127) code=3 ;; esac  # a program is missing
  echo "$code" > "$notes/$3"  # bash 5.2 forgets the code of what ends during a trap
  case "$code" in 1 | 2 | 3) kill -TERM $$ ;; esac
}

nodes=()
for i in "${!hosts[@]}"; do
  options=(--stop-at-eof --nodes "${#hosts[@]}" --endpoint "${hosts[0]#*@}:29400")
  if [ -n "${slots[$i]:-}" ]; then options+=(--processes-per-node "${slots[$i]}"); fi
  options+=("$@")  # later ones win
  words=(env "${settings[@]}" bash "$ROOT/launch/multinode.sh" --node-rank "$i" "${options[@]}")
  run_node "${hosts[$i]}" "cd $(printf %q "$PWD") || exit 2; exec $(printf '%q ' "${words[@]}")" "$i" {hold}>&- &
  nodes+=($!)
done

# wait_for I: sets `ended` to the exit code of host I; a trapped signal interrupts only the waiting.
wait_for() {
  while kill -0 "${nodes[$1]}" 2> /dev/null; do wait "${nodes[$1]}" || true; done
  ended="$(cat "$notes/$1" 2> /dev/null || echo 255)"
}

wait_for 0
code="$ended"
stop  # the first host had the rendezvous: without it the others cannot go on
for i in "${!hosts[@]}"; do
  wait_for "$i"
  if [ "$ended" != 0 ]; then echo "${0##*/}: host ${hosts[$i]} ended with exit code $ended" >&2; fi
  case "$ended" in 1 | 2 | 3) if [ "$code" = 75 ]; then code="$ended"; fi ;; esac
done
if [ "$code" = 255 ]; then die "the connection to host ${hosts[0]} broke: start again to go on" 75; fi
exit "$code"

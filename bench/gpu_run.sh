#!/usr/bin/env bash
# Everything that is measured on a GPU, in two calls of about five minutes, from a bare checkout or a copy without .git:
#
#     bench/gpu_run.sh first            smoke test, tests, race without tuning, what the device does at best
#     bench/gpu_run.sh second           tuning, race with what it found, convolutions, counters of one kernel, sanitizer
#     bench/gpu_run.sh first --rehearse the same on the CPU, tiny; only the hardware is new then
#     bench/gpu_run.sh first --force    begin anew instead of going on: results of PARTS are deleted first
#
# OUT              folder of the results (bench/out): at most eight files a call, none of them large
# COMMIT           what is measured, where git does not say
# FROM             first.tar.gz of an earlier call: what that call compiled is not compiled again
# PARTS            which parts, in place of all those of the call
# NO_TMA           1: without the copy engine, as the first call goes on by itself when its answers are wrong
# BUDGET_PERCENT   of the seconds below, for a slower or a shared machine
# TOTAL_SECONDS    of the whole call
# KERNELS          folder of the compiled kernels; Triton looks for them under the path at which it compiled them
# PYTHON           the interpreter
#
# Each part has a time limit of its own and writes every result when it is known, so a call that is cut off loses
# nothing; first.tar.gz (second.tar.gz), with all of it, the table and the compiled kernels, is made last. A part that is
# complete is skipped, one that was cut off goes on where it stopped, one that fails stops no other. Results of another
# device, commit, PyTorch or Triton are not gone on with. The exit code is 1 if a part failed, 2 if nothing could be
# begun, 130 if it was interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,26s/^# \{0,1\}//p' bench/gpu_run.sh; }
refuse() {
  echo "error: $*" >&2
  exit 2
}

CALL="" REHEARSE=() FORCE=()
for word in "$@"; do
  case "$word" in
    first | second) CALL=$word ;;
    --rehearse) REHEARSE=(--rehearse) ;;
    --force) FORCE=(--force) ;;
    -h | --help) usage; exit 0 ;;
    *) refuse "there is no option '$word'; --help says which there are" ;;
  esac
done

seconds_of() {
  case "$1" in
    smoke) echo 45 ;;
    tests) echo 110 ;;
    untuned) echo 70 ;;
    micro) echo 55 ;;
    tune) echo 120 ;;
    race) echo 110 ;;
    conv2d) echo 45 ;;
    counters) echo 25 ;;
    sanitizer) echo 60 ;; # or what is left
    *) return 1 ;;
  esac
}
case "$CALL" in
  first) ALL="smoke tests untuned micro" MOST=295 ;;
  second) ALL="tune race conv2d counters sanitizer" MOST=325 ;;
  *) refuse "say which call: first or second" ;;
esac

PYTHON=${PYTHON:-python3}
BUDGET_PERCENT=${BUDGET_PERCENT:-100}
[[ $BUDGET_PERCENT =~ ^[1-9][0-9]*$ ]] || refuse "BUDGET_PERCENT is '$BUDGET_PERCENT'; it must be a whole number above 0"
TOTAL_SECONDS=${TOTAL_SECONDS:-$((MOST * BUDGET_PERCENT / 100))}
[[ $TOTAL_SECONDS =~ ^[1-9][0-9]*$ ]] || refuse "TOTAL_SECONDS is '$TOTAL_SECONDS'; it must be a whole number above 0"
PARTS=${PARTS:-$ALL}
for part in $PARTS; do
  [[ " $ALL " == *" $part "* ]] || refuse "the $CALL call has no part '$part'; it has: $ALL"
done
[ -z "${FROM:-}" ] || [ -f "$FROM" ] || refuse "FROM is '$FROM', which is no file"

FOLDER=out
unset TRITON_INTERPRET
if [ ${#REHEARSE[@]} -gt 0 ]; then
  FOLDER=rehearsal
  export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
fi
OUT=${OUT:-$PWD/bench/$FOLDER}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
KERNELS=${KERNELS:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/sparsekern/gpu_run}
mkdir -p "$KERNELS"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
[ -n "${COMMIT:-}" ] || git rev-parse HEAD >/dev/null 2>&1 ||
  echo "== this is no checkout, and COMMIT is not set: results will say 'unknown'"
[ -z "${FROM:-}" ] || tar -xzf "$FROM" -C "$KERNELS" --strip-components=1 kernels || echo "== nothing compiled in $FROM"

# What went wrong must end in a message, never in a run that compares one thing with itself.
holds() { grep -qs "\"rehearsal\": $1" "$OUT"/*.json "$OUT"/*.jsonl; }
if [ ${#REHEARSE[@]} -gt 0 ]; then
  if holds false; then refuse "$OUT holds measurements; give a rehearsal another OUT"; fi
elif holds true; then
  refuse "$OUT holds a rehearsal; give measurements another OUT"
fi

# A part runs in the background and is waited for: a signal stops it, and all that it has started, at once.
child=""
interrupted() {
  trap '' INT TERM HUP
  if [ -n "$child" ]; then
    kill -TERM "$child" 2>/dev/null || true # timeout hands it on to its whole process group
    wait "$child" 2>/dev/null || true
  fi
  echo "== interrupted; what was measured is in $OUT: run again with OUT=$OUT to go on" >&2
  exit 130
}
trap interrupted INT TERM HUP
limited() { # seconds, command...
  local code=0
  timeout -k 3 "$@" &
  child=$!
  wait "$child" || code=$?
  child=""
  return $code
}

module_of() { case "$1" in tests) echo run_tests ;; sanitizer) echo sanitize ;; conv2d) echo race_conv2d ;; *) echo "$1" ;; esac; }
# The race without tuning reads no table, and is never taken for the one after it.
folder_of() { case "$1" in untuned) echo "$OUT/untuned" ;; *) echo "$OUT" ;; esac; }

complete() {
  case "$1" in
    sanitizer) grep -qs '"failed": false' "$OUT/sanitizer.json" ;;
    counters) [ -s "$OUT/counters.json" ] ;;
    *) grep -qs '"done": true' "$(folder_of "$1")/$1.jsonl" ;;
  esac
}

failed="" again=""
GRACE=10 # seconds: a part ends by itself, but not in the middle of a measurement
LAST=12  # seconds for the table and the archive
run_part() {
  local part=$1 budget hard ends tries=0 code=0 tma=()
  ends=$((SECONDS + $(seconds_of "$part") * BUDGET_PERCENT / 100))
  [ $ends -le $((TOTAL_SECONDS - LAST)) ] || ends=$((TOTAL_SECONDS - LAST))
  # The smoke test comes first: where the copy engine answers wrongly or hangs, what follows is measured without it.
  if [ "${NO_TMA:-}" = 1 ] || grep -qsE '"key": "tma [^"]*".*"(refused|error)"' "$OUT/smoke.jsonl"; then tma=(--no-tma); fi
  # The tests compile many kernels that nobody times: they do not belong into the archive.
  export TRITON_CACHE_DIR=$KERNELS/$([ "$part" = tests ] && echo tests || echo timed)
  while :; do
    budget=$((ends - SECONDS))
    if [ "$budget" -lt 3 ]; then
      echo "== $part: no time left"
      again="$again $part"
      return
    fi
    hard=$((TOTAL_SECONDS - LAST - SECONDS))
    [ $hard -le $((budget + GRACE)) ] || hard=$((budget + GRACE))
    echo "== $part (at most $budget s, at $SECONDS s)${tma[*]:+ without TMA}"
    code=0
    limited $hard "$PYTHON" -m "bench.gpu.$(module_of "$part")" \
      --out "$(folder_of "$part")" --seconds "$budget" "${tma[@]}" "${REHEARSE[@]}" || code=$?
    tries=$((tries + 1))
    # 4: the GPU's context is lost. 128 and more: it crashed. A new process continues after it. 137: it was killed.
    if { [ $code -eq 4 ] || { [ $code -ge 128 ] && [ $code -ne 137 ]; }; } && [ $tries -lt 6 ]; then
      echo "== $part: exit code $code, again"
      continue
    fi
    break
  done
  # One that is stopped while it ends has written everything.
  if { [ $code -eq 124 ] || [ $code -eq 137 ]; } && complete "$part"; then code=0; fi
  case $code in
    0) ;;
    3) again="$again $part" ;;
    124) echo "== $part: out of time, and it did not end by itself"; failed="$failed $part" ;;
    137) echo "== $part: killed: out of memory, or out of time and not to be stopped"; failed="$failed $part" ;;
    *) echo "== $part: FAILED, exit code $code"; failed="$failed $part" ;;
  esac
}

code=0
limited 40 "$PYTHON" -m bench.gpu.environment --out "$OUT" --parts "$PARTS" "${REHEARSE[@]}" "${FORCE[@]}" || code=$?
case $code in
  0) ;;
  2) refuse "there is no GPU that PyTorch can use; bench/gpu_run.sh $CALL --rehearse runs on the CPU" ;;
  5) exit 2 ;; # it has said why
  *) echo "== environment: FAILED, exit code $code"; failed=" environment" ;;
esac

for part in $PARTS; do
  if complete "$part"; then echo "== $part: complete"; else run_part "$part"; fi
done

# The archive: a single file that can be carried to the next call, and small enough to be handed on.
echo "== results in $OUT, after $SECONDS s"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
limited 30 "$PYTHON" -m bench.gpu.table --out "$OUT" >"$scratch/table.txt" || failed="$failed table"
ln -s "$OUT" "$scratch/results"
if [ -d "$KERNELS/timed" ]; then mkdir "$scratch/kernels" && ln -s "$KERNELS/timed" "$scratch/kernels/timed"; fi
archive() { tar -chzf "$scratch/made" --exclude='*.tar.gz' -C "$scratch" table.txt results "$@"; }
archive $([ -d "$scratch/kernels" ] && echo kernels) || failed="$failed archive"
if [ "$(stat -c %s "$scratch/made")" -gt $((15 * 2 ** 20)) ]; then
  echo "== the archive leaves out what was compiled: with it, it is larger than 15 MiB"
  archive || failed="$failed archive"
fi
mv "$scratch/made" "$OUT/$CALL.tar.gz"
cat "$scratch/table.txt"
if [ -n "$again" ]; then echo "not complete, run again to go on:$again"; fi
if [ -n "$failed" ]; then echo "FAILED:$failed"; exit 1; fi

#!/usr/bin/env bash
# Everything that is measured on a GPU, in one command and under ten minutes, from a bare checkout:
#
#     bench/gpu_run.sh                  on the GPU; results in $OUT (bench/out)
#     bench/gpu_run.sh --rehearse       the same on the CPU, tiny; only the hardware is new then
#     bench/gpu_run.sh --force          begin anew instead of going on: results of PARTS are deleted first
#
# OUT              folder of the results
# FROM             folder of earlier results to go on from (they are copied to OUT)
# PARTS            which parts, of: tests sanitizer micro tune conv2d race (the environment is recorded every time)
# BUDGET_PERCENT   of the seconds below, for a slower or a shared machine
# TOTAL_SECONDS    of all parts together; what others leave over is the comparison's
# PYTHON           the interpreter
#
# A part that is complete is skipped, one that was cut off goes on where it stopped, one that fails stops no other.
# Results of another device, commit, PyTorch or Triton are not gone on with. The exit code is 1 if a part failed, 2 if
# nothing could be begun, 130 if it was interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,19s/^# \{0,1\}//p' bench/gpu_run.sh; }
refuse() {
  echo "error: $*" >&2
  exit 2
}

REHEARSE=() FORCE=()
for word in "$@"; do
  case "$word" in
    --rehearse) REHEARSE=(--rehearse) ;;
    --force) FORCE=(--force) ;;
    -h | --help) usage; exit 0 ;;
    *) refuse "there is no option '$word'; --help says which there are" ;;
  esac
done

seconds_of() {
  case "$1" in
    environment) echo 25 ;;
    tests) echo 110 ;;
    sanitizer) echo 60 ;;
    micro) echo 45 ;;
    tune) echo 160 ;;
    conv2d) echo 45 ;;
    race) echo 400 ;; # what is left of the total
    *) return 1 ;;
  esac
}

PYTHON=${PYTHON:-python3}
BUDGET_PERCENT=${BUDGET_PERCENT:-100}
[[ $BUDGET_PERCENT =~ ^[1-9][0-9]*$ ]] || refuse "BUDGET_PERCENT is '$BUDGET_PERCENT'; it must be a whole number above 0"
TOTAL_SECONDS=${TOTAL_SECONDS:-$((560 * BUDGET_PERCENT / 100))}
[[ $TOTAL_SECONDS =~ ^[1-9][0-9]*$ ]] || refuse "TOTAL_SECONDS is '$TOTAL_SECONDS'; it must be a whole number above 0"
PARTS=${PARTS:-tests sanitizer micro tune conv2d race}
for part in $PARTS; do
  seconds_of "$part" >/dev/null || refuse "there is no part '$part'; there are: tests sanitizer micro tune conv2d race"
done
if [ -n "${FROM:-}" ]; then
  [ -d "$FROM" ] || refuse "FROM is '$FROM', which is no folder"
  [ ${#FORCE[@]} -eq 0 ] || refuse "--force begins anew and FROM goes on; give one of them"
fi

FOLDER=out
unset TRITON_INTERPRET
if [ ${#REHEARSE[@]} -gt 0 ]; then
  FOLDER=rehearsal
  export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
fi
OUT=${OUT:-$PWD/bench/$FOLDER}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 SPARSEKERN_CACHE="$OUT"

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
  timeout -k 5 "$@" &
  child=$!
  wait "$child" || code=$?
  child=""
  return $code
}

module_of() { case "$1" in tests) echo run_tests ;; sanitizer) echo sanitize ;; conv2d) echo race_conv2d ;; *) echo "$1" ;; esac; }

complete() {
  case "$1" in
    sanitizer) grep -qs '"failed": false' "$OUT/sanitizer.json" ;;
    *) grep -qs '"done": true' "$OUT/$1.jsonl" ;;
  esac
}

failed="" again=""
GRACE=20 # seconds: a part ends by itself, but not in the middle of a measurement
run_part() {
  local part=$1 budget ends tries=0 code=0
  ends=$((SECONDS + $(seconds_of "$part") * BUDGET_PERCENT / 100))
  [ $ends -le $((TOTAL_SECONDS - 12)) ] || ends=$((TOTAL_SECONDS - 12)) # the table comes after it
  while :; do
    budget=$((ends - SECONDS))
    if [ "$budget" -lt 3 ]; then
      echo "== $part: no time left"
      again="$again $part"
      return
    fi
    echo "== $part (at most $budget s, at $SECONDS s)"
    code=0
    limited $((budget + GRACE)) "$PYTHON" -m "bench.gpu.$(module_of "$part")" \
      --out "$OUT" --seconds "$budget" "${REHEARSE[@]}" || code=$?
    tries=$((tries + 1))
    # 4: the GPU's context is lost. 128 and more: it crashed. A new process continues after it. 137: it was killed.
    if { [ $code -eq 4 ] || { [ $code -ge 128 ] && [ $code -ne 137 ]; }; } && [ $tries -lt 6 ]; then
      echo "== $part: exit code $code, again"
      continue
    fi
    break
  done
  case $code in
    0) ;;
    3) again="$again $part" ;;
    124) echo "== $part: out of time, and it did not end by itself"; failed="$failed $part" ;;
    137) echo "== $part: killed: out of memory, or out of time and not to be stopped"; failed="$failed $part" ;;
    *) echo "== $part: FAILED, exit code $code"; failed="$failed $part" ;;
  esac
}

code=0
limited 60 "$PYTHON" -m bench.gpu.environment --out "$OUT" --parts "$PARTS" ${FROM:+--earlier "$FROM"} \
  "${REHEARSE[@]}" "${FORCE[@]}" || code=$?
case $code in
  0) ;;
  2) refuse "there is no GPU that PyTorch can use; bench/gpu_run.sh --rehearse runs on the CPU" ;;
  5) exit 2 ;; # it has said why
  *) echo "== environment: FAILED, exit code $code"; failed=" environment" ;;
esac

for part in $PARTS; do
  [ "$part" != environment ] || continue
  if complete "$part"; then echo "== $part: complete"; else run_part "$part"; fi
done

echo "== results in $OUT, after $SECONDS s"
limited 30 "$PYTHON" -m bench.gpu.table --out "$OUT" || failed="$failed table"
if [ -n "$again" ]; then echo "not complete, run again to go on:$again"; fi
if [ -n "$failed" ]; then echo "FAILED:$failed"; exit 1; fi

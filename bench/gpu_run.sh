#!/usr/bin/env bash
# Everything that is measured on a GPU, in one command and under ten minutes, from a bare checkout:
#
#     bench/gpu_run.sh                  on the GPU; results in $OUT (bench/out)
#     bench/gpu_run.sh --rehearse       the same on the CPU, tiny; only the hardware is new then
#     bench/gpu_run.sh --force          begin anew instead of going on
#
# OUT              folder of the results
# FROM             folder of earlier results to go on from (they are copied to OUT)
# PARTS            which parts, of: environment tests sanitizer micro tune race
# BUDGET_PERCENT   of the seconds below, for a slower or a shared machine
# TOTAL_SECONDS    of all parts together; what others leave over is the comparison's
# PYTHON           the interpreter
#
# A part that is complete is skipped, one that was cut off goes on where it stopped, one that fails stops no other. The
# exit code is 1 if a part failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

REHEARSE=() FORCE=()
for word in "$@"; do
  case "$word" in
    --rehearse) REHEARSE=(--rehearse) ;;
    --force) FORCE=(--force) ;;
    *) sed -n '2,17s/^# \{0,1\}//p' "bench/gpu_run.sh"; [ "$word" = --help ] && exit 0; exit 2 ;;
  esac
done

PYTHON=${PYTHON:-python3}
BUDGET_PERCENT=${BUDGET_PERCENT:-100}
TOTAL_SECONDS=${TOTAL_SECONDS:-$((560 * BUDGET_PERCENT / 100))}
PARTS=${PARTS:-environment tests sanitizer micro tune race}
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
if [ -n "${FROM:-}" ]; then cp -n "$FROM"/*.json "$FROM"/*.jsonl "$OUT"/ 2>/dev/null || true; fi

# What went wrong must end in a message, never in a run that compares one thing with itself.
rehearsed() { grep -qs '"rehearsal": true' "$OUT"/*.json "$OUT"/*.jsonl; }
measured() { grep -qs '"rehearsal": false' "$OUT"/*.json "$OUT"/*.jsonl; }
if { [ ${#REHEARSE[@]} -gt 0 ] && measured; } || { [ ${#REHEARSE[@]} -eq 0 ] && rehearsed; }; then
  echo "error: $OUT mixes a rehearsal with measurements; give another OUT" >&2
  exit 2
fi

module_of() { case "$1" in tests) echo run_tests ;; sanitizer) echo sanitize ;; *) echo "$1" ;; esac; }

seconds_of() {
  case "$1" in
    environment) echo 25 ;;
    tests) echo 110 ;;
    sanitizer) echo 60 ;;
    micro) echo 45 ;;
    tune) echo 130 ;;
    race) echo 400 ;; # what is left of the total
    *) echo "error: there is no part '$1'" >&2; return 1 ;;
  esac
}

complete() {
  [ ${#FORCE[@]} -eq 0 ] || return 1
  case "$1" in
    environment | sanitizer) [ -s "$OUT/$1.json" ] ;;
    *) [ -s "$OUT/$1.jsonl" ] && grep -q '"done": true' "$OUT/$1.jsonl" ;;
  esac
}

failed="" again=""
GRACE=20 # seconds: a part ends by itself, but not in the middle of a measurement
run_part() {
  local part=$1 budget ends tries=0 code=0 force
  force=("${FORCE[@]}")
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
    timeout -k 5 $((budget + GRACE)) "$PYTHON" -m "bench.gpu.$(module_of "$part")" \
      --out "$OUT" --seconds "$budget" "${REHEARSE[@]}" "${force[@]}" || code=$?
    force=()
    tries=$((tries + 1))
    # 4: the GPU's context is lost. 128 and more: it crashed. A new process goes on behind it. 124, 137: out of time.
    if { [ $code -eq 4 ] || { [ $code -ge 128 ] && [ $code -ne 137 ]; }; } && [ $tries -lt 6 ]; then
      echo "== $part: exit code $code, again"
      continue
    fi
    break
  done
  case $code in
    0) ;;
    3) again="$again $part" ;;
    124 | 137) echo "== $part: stopped, it did not end by itself"; failed="$failed $part" ;;
    *) echo "== $part: FAILED, exit code $code"; failed="$failed $part" ;;
  esac
}

for part in $PARTS; do
  seconds_of "$part" >/dev/null || exit 2
  if complete "$part"; then echo "== $part: complete"; else run_part "$part"; fi
done

echo "== results in $OUT, after $SECONDS s"
timeout -k 5 30 "$PYTHON" -m bench.gpu.table --out "$OUT" || failed="$failed table"
if [ -n "$again" ]; then echo "not complete, run again to go on:$again"; fi
if [ -n "$failed" ]; then echo "FAILED:$failed"; exit 1; fi

#!/usr/bin/env bash
# Runs the tests again and again that draw random examples or watch memory, time, threads or processes (the marker "volatile"):
#   scripts/repeat_tests.sh [times, 20] [pytest's arguments]
# Each run has random examples of another seed, and every second one shares the cores with a busy loop on each. The last line says how
# many runs failed.
set -uo pipefail
cd "$(dirname "$0")/.."
times=${1:-20}
shift || true
failed=0 busy=() log=$(mktemp)
calm() { [ ${#busy[@]} = 0 ] || { kill "${busy[@]}"; wait "${busy[@]}"; } 2>/dev/null; busy=(); }
trap 'calm; rm -f "$log"' EXIT
for ((run = 1; run <= times; run++)); do
  beside=nothing
  if ((run % 2 == 0)); then
    beside="busy loops"
    for ((core = 0; core < $(nproc); core++)); do
      while :; do :; done &
      busy+=($!)
    done
  fi
  VTOK_FAST_TEST_SEED=$run .venv/bin/python -m pytest -q -p no:cacheprovider -m "volatile and not slow" --numprocesses auto --maxprocesses 8 \
    --dist worksteal "$@" >"$log" 2>&1
  status=$?
  calm
  echo "run $run, seed $run, beside $beside: $(tail -1 "$log")"
  [ $status = 0 ] || { failed=$((failed + 1)); grep -E "^(FAILED|ERROR|E  )" "$log"; }
done
echo "$times runs, $failed failed"
[ $failed = 0 ]

#!/usr/bin/env bash
# Set everything up, then run the tests, in two processes that share them.
#   scripts/test.sh          the fast set (four and a half minutes on two cores)
#   scripts/test.sh --all    everything that needs no GPU: the fast set under coverage, then the slow
#                            tests and every property again with more examples
# Further arguments go to a single pytest: scripts/test.sh tests/storage -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh cpu
. scripts/env.sh

all=
if [ "${1:-}" = --all ]; then
  shift
  all=1
fi
if [ $# -gt 0 ]; then
  select="not slow and not gpu"
  if [ -n "$all" ]; then
    select="not gpu"
    export LITECACHE_TEST_PROFILE=slow
  fi
  python -m pytest -m "$select" "$@"
  exit
fi

# One of the two processes, with those tests of "$select" that it claims first.
half() {
  local first=$1 status=0 began=$SECONDS
  shift
  LITECACHE_TEST_SHARE="$claims:$first" COVERAGE_FILE="$litecache_tmp/$first.coverage" \
    python -m pytest -m "$select" "$@" || status=$?
  echo "== the half that began with $first: $((SECONDS - began)) s"
  return "$status"
}

# Run the tests of $1 in two processes. One begins with those that start Ray, one with the rest, and
# whoever is through goes on with files of the other. The output of the first is printed at the end.
# A few that fail are tried once more, alone: one that had waited in vain for a machine with time for
# it passes then, and stands in the output; one that is wrong fails again.
in_two() {
  local select=$1 status=0 failed claims
  shift
  claims=$(mktemp -d -p "$litecache_tmp")
  export LITECACHE_TEST_FAILED="$litecache_tmp/failed"
  : >"$LITECACHE_TEST_FAILED"
  half ray "$@" >"$litecache_tmp/ray.log" 2>&1 &
  local ray=$!
  half rest "$@" || status=$?
  wait "$ray" || status=$((status > $? ? status : $?))
  cat "$litecache_tmp/ray.log"
  mapfile -t failed < <(sort -u "$LITECACHE_TEST_FAILED")
  unset LITECACHE_TEST_FAILED
  # 1 = tests have failed; what ended otherwise has not run all of them
  if [ "$status" = 1 ] && [ "${#failed[@]}" -ge 1 ] && [ "${#failed[@]}" -le 5 ]; then
    printf '== once more, alone: %s\n' "${failed[@]}"
    python -m pytest "${failed[@]}" && status=0
  fi
  return "$status"
}

if [ -z "$all" ]; then
  # coverage would double the time of what is mostly Python
  in_two "not slow and not gpu" --durations=10
  exit
fi

failed=0
in_two "not slow and not gpu" --durations=10 --cov --cov-report= || failed=1
LITECACHE_TEST_PROFILE=slow in_two "(slow or hypothesis) and not gpu" --durations=10 || failed=1
echo
export COVERAGE_FILE="$litecache_tmp/coverage"
python -m coverage combine -q "$litecache_tmp/ray.coverage" "$litecache_tmp/rest.coverage"
echo "Line coverage of actors/ (what coverage's start-up hook sees in Ray's workers):"
python -m coverage report --include='litecache/actors/*' || true
echo "Line coverage of everything else, by the fast set (at least 85 %):"
python -m coverage report --omit='litecache/actors/*' --skip-covered --fail-under=85 || failed=1
exit "$failed"

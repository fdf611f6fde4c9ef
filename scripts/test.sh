#!/usr/bin/env bash
# Set everything up, then run the tests, in two processes that share them.
#   scripts/test.sh          the fast set (four and a half minutes on two cores, 2026-11-29)
#   scripts/test.sh --all    everything that needs no GPU: the fast set under coverage, then the slow
#                            tests and every property with more examples
#   scripts/test.sh --long   the same, and what CI has no time for: more examples, the whole of SmolLM2
#                            for each feature, the longest prompts, a second world of nodes
# Further arguments go to a single pytest: scripts/test.sh tests/storage -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh cpu
. scripts/env.sh

all=
profile=slow
case "${1:-}" in
  --all) all=1; shift ;;
  --long) all=1 profile=long; shift ;;
esac
if [ $# -gt 0 ]; then
  select="not slow and not gpu"
  if [ -n "$all" ]; then
    select="not gpu"
    export LITECACHE_TEST_PROFILE=$profile
  fi
  python -m pytest -m "$select" "$@"
  exit
fi

# What this process claims first of a set of tests: part FIRST SET MARKERS [ARGUMENTS]. The set is
# named by its profile.
part() {
  local first=$1 set=$2 markers=$3 status=0 began=$SECONDS
  shift 3
  LITECACHE_TEST_SHARE="$litecache_tmp/$set:$first" LITECACHE_TEST_FAILED="$litecache_tmp/$set.failed" \
    LITECACHE_TEST_PROFILE=$set COVERAGE_FILE="$litecache_tmp/$first.coverage" \
    python -m pytest --durations=10 -m "$markers" "$@" || status=$?
  echo "== $set, the half that began with $first: $((SECONDS - began)) s"
  return "$status"
}

# One of the two processes, with its part of each set.
half() {
  local status=0
  if [ -z "$all" ]; then
    # coverage would double the time of what is mostly Python
    part "$1" fast "not slow and not gpu" || status=$?
    return "$status"
  fi
  # properties come once, with more examples; the lines are reached without them
  part "$1" fast "not slow and not hypothesis and not gpu" --cov --cov-report= || status=$?
  part "$1" "$profile" "(slow or hypothesis) and not gpu" || status=$((status > $? ? status : $?))
  return "$status"
}

# One begins with the tests that start Ray, one with the rest, and whoever is through goes on with
# files of the other. The output of the first is printed at the end.
mkdir "$litecache_tmp/fast" "$litecache_tmp/$profile"
status=0
half ray >"$litecache_tmp/ray.log" 2>&1 &
ray=$!
half rest || status=$?
wait "$ray" || status=$((status > $? ? status : $?))
cat "$litecache_tmp/ray.log"

# Those of a few files that fail are tried once more, alone: one that had waited in vain for a
# machine with time for it passes then, and stands in the output; one that is wrong fails again.
if [ "$status" = 1 ] && compgen -G "$litecache_tmp/*.failed" >/dev/null; then
  status=0  # what ended otherwise has not run all of them
  for set in fast "$profile"; do
    [ -e "$litecache_tmp/$set.failed" ] || continue
    mapfile -t failed < <(sort -u "$litecache_tmp/$set.failed")
    files=$(printf '%s\n' "${failed[@]%%::*}" | sort -u | wc -l)
    [ "$files" -le 5 ] || { status=1; continue; }
    printf '== once more, alone: %s\n' "${failed[@]}"
    LITECACHE_TEST_PROFILE=$set python -m pytest "${failed[@]}" || status=1
  done
fi
[ -n "$all" ] || exit "$status"

echo
export COVERAGE_FILE="$litecache_tmp/coverage"
python -m coverage combine -q "$litecache_tmp/ray.coverage" "$litecache_tmp/rest.coverage"
echo "Line coverage of actors/ (what coverage's start-up hook sees in Ray's workers):"
python -m coverage report --include='litecache/actors/*' || true
echo "Line coverage of everything else, by the fast set (at least 85 %):"
python -m coverage report --omit='litecache/actors/*' --skip-covered --fail-under=85 || status=1
exit "$status"

#!/usr/bin/env bash
# Set everything up, then run the tests.
#   scripts/test.sh          the fast set (5 minutes on two cores)
#   scripts/test.sh --all    everything that needs no GPU, with coverage (at most 45 minutes)
# Further arguments go to pytest: scripts/test.sh tests/storage -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh cpu
. scripts/env.sh

select="not slow and not gpu"
all=
if [ "${1:-}" = --all ]; then
  shift
  all=1
  select="not gpu"
  export LITECACHE_TEST_PROFILE=slow
fi
if [ $# -gt 0 ]; then
  python -m pytest -m "$select" "$@"
  exit
fi
if [ -z "$all" ]; then
  # coverage would double the time of what is mostly Python
  exec python -m pytest -m "$select" --durations=10
fi

python -m coverage erase
failed=0
python -m pytest -m "$select" --durations=10 --cov --cov-report= || failed=$?
echo
echo "Line coverage of actors/ (what coverage's start-up hook sees in Ray's workers):"
python -m coverage report --include='litecache/actors/*' || true
echo "Line coverage of everything else (at least 85 %):"
python -m coverage report --omit='litecache/actors/*' --skip-covered --fail-under=85 || failed=${failed/#0/1}
exit "$failed"

#!/usr/bin/env bash
# The linters, all of them, then one verdict: ruff, ruff format, mypy, import-linter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
scripts/setup.sh cpu || exit 1
export PATH="$PWD/.venv/bin:$PATH"
failed=0
for check in "ruff check" "ruff format --check" "mypy" "lint-imports"; do
  echo "== $check"
  $check || failed=1
done
exit "$failed"

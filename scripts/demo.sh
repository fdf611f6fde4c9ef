#!/usr/bin/env bash
# Set everything up, then run examples/shared_prefix.py: a document's KV survives a restart.
#   scripts/demo.sh [--json FILE] [other options of the example]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh cpu
. scripts/env.sh
python examples/shared_prefix.py "$@"

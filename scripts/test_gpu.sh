#!/usr/bin/env bash
# Set up against the machine's own CUDA torch, then run the GPU tests and the end-to-end check.
#   scripts/test_gpu.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh gpu
. scripts/env.sh
python -m pytest -m gpu "$@"
python scripts/check_gpu.py

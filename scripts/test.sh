#!/usr/bin/env bash
# Style and the test suite: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
ruff check .
ruff format --check .
python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 "$@"  # else the longest tests come last

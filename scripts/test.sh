#!/usr/bin/env bash
# The test suite: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
python -m pytest -q --durations=15 "$@"

#!/usr/bin/env bash
# Everything that needs a GPU, in at most ten minutes on one: bash scripts/gpu_check.sh [--small] [out=FILE.json]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
python -m tests.gpu_check "$@"

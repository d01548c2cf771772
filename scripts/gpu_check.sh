#!/usr/bin/env bash
# What this code does on a GPU (tests/gpu_check.py): bash scripts/gpu_check.sh step|race|exact|several [--small] [out=FOLDER]
# Where a python3 has torch, that one is used, with the wheels in .gpu/ (scripts/gpu_pack.sh), or those that it has: no
# pip, no package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
needed='import torch'
[ -d .gpu ] || needed='import torch, hydra, diffusers'
if "$python" -c "$needed" 2> /dev/null; then
    for wheel in .gpu/*.whl; do
        [ ! -e "$wheel" ] || [ -e ".gpu/site/$(basename "$wheel")" ] && continue
        "$python" -m zipfile -e "$wheel" .gpu/site && touch ".gpu/site/$(basename "$wheel")"
    done
    export PYTHONPATH="$PWD/.gpu/site${PYTHONPATH:+:$PYTHONPATH}"
else
    source scripts/venv.sh
    python=python
fi
exec "$python" -m tests.gpu_check "$@"

#!/usr/bin/env bash
# For a GPU machine that has torch but no package index: wheels and Fashion-MNIST's shards into .gpu/, which git ignores.
# bash scripts/gpu_pack.sh [PYTHON], that machine's version, 3.12; then copy this folder there and run gpu_check.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
mkdir -p .gpu
platforms=()
for n in 28 27 24 17; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
python -m pip wheel --quiet --no-deps -w .gpu 'antlr4-python3-runtime==4.9.3'  # Hydra's parser, which has no wheel
python -m pip download --quiet --no-deps --only-binary=:all: --python-version "${1:-3.12}" --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d .gpu 'hydra-core>=1.3.6,<1.4' \
    'omegaconf<2.4' diffusers mlxtend torch-fidelity 'pytest>=8' pytest-xdist execnet iniconfig pluggy importlib-metadata zipp
python -c 'import data; data.prepare("fashion", ".gpu/fashion")' 2>&1 | tail -n 1 || echo "without it, no race there" >&2
du -sh .gpu

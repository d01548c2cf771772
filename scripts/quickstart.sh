#!/usr/bin/env bash
# Trains a routed DiT on the embedded digits, samples from it and scores it. Arguments go to train.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

run=runs/quickstart
accelerate launch train.py model=tread run_name=quickstart "$@"
python sample.py ckpt=$run guidance=cfg scale=2.0 steps=18 seeds=0-99
python fid.py calc ckpt=$run guidance=cfg scale=2.0 steps=18 seeds=0-999 labels=balanced
python scripts/summary.py $run

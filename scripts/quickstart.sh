#!/usr/bin/env bash
# Trains a routed DiT on the embedded digits, samples from it and scores it. Arguments go to train.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

run=runs/quickstart
guidance="guidance=cfg scale=2.0 steps=19"
installed=$SECONDS
python train.py model=tread objective=rf optimizer=muon train.lr=1e-2 train.warmup_steps=50 \
    train.max_steps=600 train.decay_steps=250 run_name=quickstart "$@"
trained=$SECONDS
python sample.py ckpt=$run $guidance seeds=0-99
sampled=$SECONDS
python fid.py calc ckpt=$run $guidance seeds=0-999 labels=balanced
python scripts/plot.py summary $run
echo "  seconds: $installed installing, $((trained - installed)) training, $((sampled - trained)) sampling," \
    "$((SECONDS - sampled)) scoring; $SECONDS in all"

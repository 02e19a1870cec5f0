#!/usr/bin/env bash
# On a machine with a CUDA device: the GPU tests, the speed of a training step, a real training and its evaluation.
#   scripts/gpu_check.sh OUT      writes OUT/{tests.txt,bench.json,train.json,eval.json}; needs ROPELAB_DATA with books
set -euo pipefail
out=${1:?usage: scripts/gpu_check.sh OUT}
mkdir -p "$out"
python=${PYTHON:-python3}
$python -m pytest -q -m gpu tests/test_gpu.py 2>&1 | tee "$out/tests.txt"
for compile in false true; do
    $python -m ropelab bench train model=gpt2 train.ctx=1024 train.batch_size=32 train.compile=$compile --no-peers --json
done > "$out/bench.json"
recipe=(data=books model=small data.tokenizer=bpe train.ctx=512 train.batch_size=64 train.steps=2000 train.lr=1e-3)
$python -m ropelab train --pos rope "${recipe[@]}" train.compile=true --json > "$out/train.json"
$python -m ropelab eval --ctx 8192 --protocol last eval.last=256 'eval.scalings=[none,linear,ntk,yarn,dynamic_ntk]' \
    --json > "$out/eval.json"

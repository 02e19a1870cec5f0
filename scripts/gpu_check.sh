#!/usr/bin/env bash
# On a machine with a CUDA device, in less than ten minutes: the GPU tests, the accuracy of the kernels, the speed of
# training, attention, evaluation, the start and many small runs, and a real training with its evaluation.
#   scripts/gpu_check.sh OUT              JSON into OUT, one file a part; a part that fails is named, the others go on
#   ROPELAB_GPU_CHECK_DRY=1               tiny shapes, for a machine without a GPU: does the script run?
#   ROPELAB_DATA=FOLDER                   with books in it: the training at the end; without, it is left out
set -uo pipefail
out=${1:?usage: scripts/gpu_check.sh OUT}
mkdir -p "$out"
python=${PYTHON:-python3}
failed=()

# part SECONDS FILE COMMAND...: the output of the command in OUT/FILE, within so many seconds
part() {
    local seconds=$1 file=$2
    shift 2
    echo "== $file: $*" >&2
    if ! timeout "$seconds" "$@" > "$out/$file" 2> "$out/${file%.*}.log"; then
        failed+=("$file")
        tail -n 3 "$out/${file%.*}.log" >&2
    fi
}
ropelab=("$python" -m ropelab)

if [[ ${ROPELAB_GPU_CHECK_DRY:-} ]]; then
    model=(model.n_layer=1 model.d_model=32 model.n_head=2) small=("${model[@]}")
    short=(train.ctx=64 train.batch_size=2) long=(train.ctx=128 train.batch_size=1)
    vocab=300 lengths=64,128 evaluated=256, rounds=1 models=2 methods=rope,alibi,t5
    recipe=(data=stdlib train.ctx=64 train.batch_size=2 train.steps=4) ladder=256
    scored=(eval.tokens=2048 eval.last=32)
else
    model=(model=gpt2) small=(model=small)
    short=(train.ctx=1024 train.batch_size=32) long=(train.ctx=8192 train.batch_size=4)
    vocab=50258 lengths=1024,8192,32768 evaluated=16384,131072 rounds=5 models=10 methods=rope,alibi,t5,kerple_log,fire
    recipe=(data=books data.tokenizer=bpe train.ctx=512 train.batch_size=64 train.steps=2000 train.lr=1e-3) ladder=8192
    scored=(eval.last=256 'eval.scalings=[none,linear,ntk,yarn,dynamic_ntk]')
fi

part 20 environment.json "$python" - <<'PY'
import importlib.util, json, platform, torch
found = torch.cuda.is_available()
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version() if found else None,
    "triton": importlib.util.find_spec("triton") and __import__("triton").__version__,
    "device": torch.cuda.get_device_name() if found else None,
    "memory": torch.cuda.get_device_properties(0).total_memory if found else None,
}))
PY
part 100 tests.txt "$python" -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py tests/test_triton.py
part 50 start.json "${ropelab[@]}" bench start "${small[@]}" "${short[@]}" --json
part 90 train-1024.json "${ropelab[@]}" bench train "${model[@]}" "${short[@]}" --methods $methods --vocab $vocab \
    --no-peers --rounds $rounds --json
part 70 train-8192.json "${ropelab[@]}" bench train "${model[@]}" "${long[@]}" --methods $methods --vocab $vocab \
    --no-peers --rounds $rounds --json
part 60 attention.json "${ropelab[@]}" bench attention "${model[@]}" --ctx $lengths --rounds $rounds --json
part 50 eval.json "${ropelab[@]}" bench eval "${model[@]}" --ctx $evaluated --methods rope,alibi,t5 --rounds 2 eval.dtype=auto \
    --json
part 40 many.json "${ropelab[@]}" bench many "${small[@]}" "${short[@]}" --models $models --rounds 2 --json
if [[ ${ROPELAB_GPU_CHECK_DRY:-} || ${ROPELAB_DATA:-} ]]; then
    export ROPELAB_RUNS="$out/runs"
    part 110 train.json "${ropelab[@]}" train --pos rope "${small[@]}" "${recipe[@]}" --json
    part 30 evaluation.json "${ropelab[@]}" eval --ctx $ladder --protocol last "${scored[@]}" --json
fi
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi

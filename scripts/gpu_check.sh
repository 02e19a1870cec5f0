#!/usr/bin/env bash
# On a machine with a CUDA device, in less than ten minutes: the GPU tests, the accuracy of the kernels, the speed of
# attention, training, evaluation, the start and many small runs, and a real training with its evaluation.
#   scripts/gpu_check.sh OUT              one JSON a part into OUT; a part that fails says so there, the others go on
#   ROPELAB_GPU_CHECK_DRY=1               tiny shapes, for a machine without a GPU: does the script run?
#   ROPELAB_DATA=FOLDER                   with books in it: the training at the end; without, it is left out
# Exit status 1 where a part failed; OUT/summary.json lists the parts, their seconds and their status (124: too slow).
set -euo pipefail
out=${1:?usage: scripts/gpu_check.sh OUT}
mkdir -p "$out"
python=${PYTHON:-python3}
ropelab=("$python" -m ropelab)
summary=()
failed=()

# part SECONDS NAME COMMAND...: what the command prints goes to OUT/NAME.json, its remarks to OUT/NAME.log
part() {
    local limit=$1 name=$2 status=0 began=$SECONDS
    shift 2
    echo "== $name" >&2
    timeout --kill-after=5 $((limit * slower)) "$@" > "$out/$name.partial" 2> "$out/$name.log" || status=$?
    if ((status == 0)); then
        mv "$out/$name.partial" "$out/$name.json"
    else
        printf '{"failed": true, "status": %d, "log": "%s.log"}\n' "$status" "$name" > "$out/$name.json"
        failed+=("$name")
        tail -n 3 "$out/$name.log" >&2
    fi
    summary+=("$(printf '"%s": {"status": %d, "seconds": %d}' "$name" "$status" $((SECONDS - began)))")
    (IFS=,; printf '{"seconds": %d, "parts": {%s}}\n' "$SECONDS" "${summary[*]}" > "$out/summary.json")
}

# The limits come to 545 seconds; the dry form, which may run beside others, has more. 50304 entries of the vocabulary: a multiple of 64, as nanoGPT has it.
if [[ ${ROPELAB_GPU_CHECK_DRY:-} ]]; then
    slower=5 model=(model.n_layer=1 model.d_model=32 model.n_head=2) small=("${model[@]}")
    short=(train.ctx=64 train.batch_size=2) long=(train.ctx=128 train.batch_size=1)
    vocab=300 lengths=64,128 evaluated=1024, rounds=1 models=2 methods=rope,alibi,t5,kerple_log,fire
    recipe=(data=stdlib train.ctx=64 train.batch_size=2 train.steps=4) ladder=256
    scored=(eval.tokens=2048 eval.last=32)
else
    slower=1 model=(model=gpt2) small=(model=small)
    short=(train.ctx=1024 train.batch_size=32) long=(train.ctx=8192 train.batch_size=4)
    vocab=50304 lengths=1024,8192,131072 evaluated=16384,131072 rounds=3 models=10 methods=rope,alibi,t5,kerple_log,fire
    recipe=(data=books data.tokenizer=bpe train.ctx=512 train.batch_size=64 train.steps=2000 train.lr=1e-3) ladder=8192
    scored=(eval.last=256 'eval.scalings=[none,linear,ntk,yarn,dynamic_ntk]')
fi
batches=(train.ctx=512 train.batch_size=16)
[[ ${ROPELAB_GPU_CHECK_DRY:-} ]] && batches=("${short[@]}")

part 15 environment "$python" -c '
import importlib, json, platform, shutil, subprocess, torch

found = torch.cuda.is_available()
try:
    triton = importlib.import_module("triton").__version__
except ImportError:
    triton = None
smi = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton,
    "cudnn": torch.backends.cudnn.version() if found else None,
    "device": torch.cuda.get_device_name() if found else None,
    "memory_bytes": torch.cuda.get_device_properties(0).total_memory if found else None, "nvidia_smi": smi,
}))'
cat "$out/environment.json" >&2
part 70 tests "$python" -c '
import json, sys, pytest

class Counts:
    found = {}
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.found[report.outcome] = self.found.get(report.outcome, 0) + 1

sys.stdout, kept = sys.stderr, sys.stdout
status = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Counts()])
print(json.dumps({"exit": int(status), **Counts.found}), file=kept)
sys.exit(status)' tests/test_gpu.py tests/test_triton.py
cp "$out/tests.log" "$out/tests.txt"
part 100 attention "${ropelab[@]}" bench attention "${model[@]}" --ctx "$lengths" --rounds "$rounds" --json
part 90 train-1024 "${ropelab[@]}" bench train "${model[@]}" "${short[@]}" --methods "$methods" --vocab "$vocab" \
    --no-peers --rounds "$rounds" --json
part 75 train-8192 "${ropelab[@]}" bench train "${model[@]}" "${long[@]}" --methods "$methods" --vocab "$vocab" \
    --no-peers --rounds "$rounds" --json
part 65 eval "${ropelab[@]}" bench eval "${model[@]}" --ctx "$evaluated" --methods rope,alibi,t5 eval.dtype=auto --json
part 35 start "${ropelab[@]}" bench start "${small[@]}" "${short[@]}" --json
part 25 many "${ropelab[@]}" bench many "${small[@]}" "${batches[@]}" --models "$models" --rounds 2 --json
if [[ ${ROPELAB_GPU_CHECK_DRY:-} || ${ROPELAB_DATA:-} ]]; then
    export ROPELAB_RUNS="$out/runs"
    part 55 train "${ropelab[@]}" train --pos rope "${small[@]}" "${recipe[@]}" --json
    part 15 evaluation "${ropelab[@]}" eval --ctx "$ladder" --protocol last "${scored[@]}" --json
fi
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi

#!/usr/bin/env bash
# What 25 minutes on a GPU should answer, most valuable first. The limits below add up to no more.
#
#   bash bench/gpu_suite.sh            all of it, one step after the other
#   bash bench/gpu_suite.sh 4          this step only (for machines that lend minutes at a time); several: 4 6
#   bash bench/gpu_suite.sh 4-         from this step on
#
# Rows land in bench/results/*.jsonl as they are made, so a step that is cut off leaves what it had; with $OUT set they
# are copied there too. A checkout without its .git names its commit: BENCH_COMMIT=... (of a clean tree). SPINFAST_MODEL
# is the model of the whole run, a directory; without one it has random weights.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
export PYTHONPATH=".:kernels:${PYTHONPATH:-}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
SHAPE=random:Qwen2.5-0.5B
CHOSEN=("$@")
WORK=$(mktemp -d) && trap 'rm -rf "$WORK"' EXIT

missing() { "$PYTHON" -c 'import importlib.util, sys; print(*(n for n in sys.argv[1:] if not importlib.util.find_spec(n)))' "$@"; }
has() { [ -z "$(missing "$@")" ]; }
say() { echo "gpu_suite: $*" >&2; }

chosen() {  # number: was this step asked for?
  local each
  [ ${#CHOSEN[@]} -eq 0 ] && return 0
  for each in "${CHOSEN[@]}"; do
    [ "$each" = "$1" ] && return 0
    [[ $each == *- && $1 -ge ${each%-} ]] && return 0
  done
  return 1
}

step() {  # number, seconds, name, command...
  local number=$1 seconds=$2 name=$3; shift 3
  chosen "$number" || return 0
  local start=$SECONDS
  echo "=== $number $name (at most $seconds s)"
  timeout --kill-after=10 "$seconds" "$@"
  echo "=== $number $name: exit $? after $((SECONDS - start)) s"
  if [ -n "${OUT:-}" ]; then mkdir -p "$OUT/results" && cp bench/results/*.jsonl "$OUT/results/"; fi
}

absent=$(missing torch triton transformers peft safetensors pyarrow pydantic typing_inspection numba datasets psutil yaml \
  rich tensorboard pytest hypothesis) || exit 1
if [ -n "$absent" ]; then say "missing: $absent; gather them where there is a network: python -m bench wheels DIR $absent"; exit 1; fi
absent=$(missing vllm trl liger_kernel unsloth matplotlib reasoning_gym)
if [ -n "$absent" ]; then say "goes without: $absent (python -m bench wheels DIR ... gathers them)"; fi
if [ -z "${BENCH_COMMIT:-}" ] && ! git rev-parse HEAD >/dev/null 2>&1; then
  say "no git history here: BENCH_COMMIT=<the commit of this tree> must say what is measured"; exit 1
fi
"$PYTHON" -c "import torch; assert torch.cuda.is_available(), 'no CUDA GPU'; print(torch.cuda.get_device_name(), torch.__version__)" || exit 1

# peers that can run here; without TRL the eager loop is the gate's reference
PEERS="bare GEMMs,spinfast,eager"
has trl && PEERS+=",trl" && has liger_kernel && PEERS+=",trl-liger"
has trl unsloth && PEERS+=",unsloth"

whole_run() {  # SFT, two iterations of self-play, GRPO and, by itself, DPO: vLLM on the policy's weights, sums made here
  has vllm || { say "step 2 needs vllm"; return 1; }
  "$PYTHON" - "$WORK" "${SPINFAST_MODEL:-}" <<'EOF'
import json, sys
from pathlib import Path
from bench import shapes

work, model = Path(sys.argv[1]), sys.argv[2]
model = model or shapes.random_model(work / "model", shapes.shape("tiny-256"))
sums = [(f"What is {i} plus {7 * i}?", f"{i} + {7 * i} = {8 * i}\n#### ", 8 * i) for i in range(80)]
answers = [{"question": asked, "answer": f"{steps}{result}"} for asked, steps, result in sums]
pairs = [{"prompt": asked, "chosen": f"{steps}{n}", "rejected": f"{steps}{n + 1}"} for asked, steps, n in sums]
runs = {
    "answers": (answers, {"method": ["sft", "spin", "grpo"], "spin": {"iterations": 2}, "grpo": {"rewards": "coin", "steps": 4}}),
    "pairs": (pairs, {"method": "dpo"}),
}
for name, (rows, config) in runs.items():
    for part, chosen in {"data": rows[:64], "heldout": rows[64:]}.items():
        (work / f"{name}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        config[part] = {"source": str(work / f"{name}_{part}.jsonl")}
    config |= {"model": {"name": str(model)}, "generation": {"backend": "vllm"}, "evaluate": {"max_tokens": 48}}
    (work / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
EOF
  for name in answers pairs; do
    "$PYTHON" -m spinfast.run "$WORK/$name.yaml" "device.profile=${PROFILE:-t4}" --run-dir "$WORK/$name" || return 1
  done
}
profile_and_roofline() {
  "$PYTHON" -m bench profile --model $SHAPE --count 16 && "$PYTHON" -m bench roofline --model $SHAPE --tokens 2048 8192
}
limits_and_scaling() {
  "$PYTHON" -m bench scaling --model Qwen2.5-0.5B --only tokens &&
    "$PYTHON" -m bench limits --dtype float16 --only spinfast
}
export -f missing has say whole_run profile_and_roofline limits_and_scaling
export PYTHON WORK SHAPE

step 1 300 "kernels and attention are right on this GPU" \
  "$PYTHON" -m pytest -q tests/kernels tests/test_attention.py tests/test_fuse.py \
  --ignore tests/kernels/test_compile.py -m "not slow and not faults" -p no:cacheprovider
step 2 300 "a whole run with vLLM, a T4 rehearsed" bash -c whole_run
step 3 120 "a T4's memory rehearsed: predicted against measured" "$PYTHON" -m bench rehearse
step 4 300 "training beside the peers, fp16" \
  "$PYTHON" -m bench peers --device cuda --dtype float16 --model $SHAPE --count 64 --pairs-per-step 8 --rounds 1 --only "$PEERS"
step 5 120 "where the time goes, and the roofline of the device" bash -c profile_and_roofline
step 6 240 "operators against floor and eager" "$PYTHON" -m bench kernels --rounds 7
step 7 120 "steps as they grow, and the largest in a T4's memory" bash -c limits_and_scaling
if [ ${#CHOSEN[@]} -eq 0 ]; then "$PYTHON" -m bench results; fi

#!/usr/bin/env bash
# What half an hour on a GPU should answer, most valuable first; every command ends within 8 minutes.
#
#   bash bench/gpu_suite.sh            all of it, one command after the other
#   bash bench/gpu_suite.sh 1 4        these steps only (for machines that lend minutes at a time)
#
# Needs torch, triton, transformers, peft, pydantic, psutil and pytest; what is missing (TRL, Liger, Unsloth, vLLM, data sets) is skipped by name.
# Rows land in bench/results/*.jsonl as they are made, so a run that is cut off leaves what it had; with $OUT set they
# are copied there too.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
export PYTHONPATH=".:kernels:${PYTHONPATH:-}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
SHAPE=random:Qwen2.5-0.5B

step() {  # number, minutes, name, command...
  local number=$1 minutes=$2 name=$3; shift 3
  if [ ${#CHOSEN[@]} -gt 0 ] && [[ " ${CHOSEN[*]} " != *" $number "* ]]; then return; fi
  local start=$SECONDS
  echo "=== $number $name"
  timeout $((minutes * 60)) "$@"
  echo "=== $number $name: exit $? after $((SECONDS - start)) s"
  if [ -n "${OUT:-}" ]; then mkdir -p "$OUT/results" && cp bench/results/*.jsonl "$OUT/results/"; fi
}

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# peers that can run here; without TRL the eager loop is the gate's reference
PEERS="bare GEMMs,spinfast,eager"
if has trl && has datasets; then PEERS+=",trl,trl-precomputed"; has liger_kernel && PEERS+=",trl-liger"; has unsloth && PEERS+=",unsloth"; fi

for needed in triton transformers peft pydantic psutil pytest; do
  has $needed || { echo "gpu_suite: $needed is not installed; bring it (its wheel needs no network)" >&2; exit 1; }
done
CHOSEN=("$@")
"$PYTHON" -c "import torch; assert torch.cuda.is_available(), 'no CUDA GPU'; print(torch.cuda.get_device_name(), torch.__version__)" || exit 1

step 1 6 "kernels and attention are right on this GPU" \
  "$PYTHON" -m pytest -q -x tests/kernels tests/test_attention.py tests/test_fuse.py -m "not slow and not faults" -p no:cacheprovider
step 2 8 "training beside the peers, fp16" \
  "$PYTHON" -m bench peers --device cuda --dtype float16 --model $SHAPE --count 64 --pairs-per-step 8 --rounds 2 --only "$PEERS"
step 3 4 "a T4's memory rehearsed: predicted against measured" \
  "$PYTHON" -m bench rehearse
step 4 8 "operators against floor and eager" \
  "$PYTHON" -m bench kernels --rounds 5
step 5 3 "roofline of the device" \
  "$PYTHON" -m bench roofline --model $SHAPE --tokens 2048 8192
step 6 8 "largest batch and longest answers in a T4's memory" \
  "$PYTHON" -m bench peers --device cuda --dtype float16 --model $SHAPE --limits 14.7 --only "spinfast,eager"
step 7 8 "scaling" \
  "$PYTHON" -m bench scaling --device cuda --model Qwen2.5-0.5B --only tokens,length
step 8 3 "where the time goes" \
  "$PYTHON" -m bench profile --model $SHAPE --count 16
step 9 6 "training beside the peers, bf16" \
  "$PYTHON" -m bench peers --device cuda --dtype bfloat16 --model $SHAPE --count 64 --pairs-per-step 8 --rounds 1 --only "$PEERS"
if [ ${#CHOSEN[@]} -eq 0 ]; then "$PYTHON" -m bench results; fi

#!/usr/bin/env bash
# What a machine with an NVIDIA GPU is to show, in one command of under 9 minutes: the gpu tests, the kernels and rules
# in device and host memory, and LoRA steps of the largest model at hand. Tables go to FOLDER (default: runs/gpu_day),
# with the device's name and copy speed in them.
#   bash scripts/gpu_day.sh [FOLDER]
#   bash scripts/gpu_day.sh --dry-run      elsewhere: the same on the CPU in toy sizes, to check that it runs
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
dry=""
if [ "$1" = "--dry-run" ]; then dry=1; shift; fi
folder=${1:-runs/gpu_day}
mkdir -p "$folder"
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
status=0
step() { # NAME SECONDS COMMAND...: its output goes to the terminal and to FOLDER/NAME.md
  local name=$1 limit=$2
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" 2>"$folder/$name.err" | tee "$folder/$name.md"
  local code=${PIPESTATUS[0]}
  if [ "$code" != 0 ]; then
    echo "-- $name ended with $code: $(tail -n 1 "$folder/$name.err")"
    status=1
  fi
}
if [ -n "$dry" ]; then
  step kernels 120 "$python" scripts/bench_kernels.py --n 16 --d 100000 --repeats 1 --rules
else
  if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "No CUDA device is seen by torch here. bash scripts/gpu_day.sh --dry-run checks the script without one." >&2
    exit 1
  fi
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$folder/device.md"
  step tests 150 "$python" -m pytest -q -n 6 -m gpu tests/kernels tests/matrix tests/test_gpu.py -p no:cacheprovider
  step kernels 90 "$python" scripts/bench_kernels.py --device cuda --n 16 64 --d 1000000 10000000 --dtype float32 bfloat16
  step large 90 "$python" scripts/bench_kernels.py --device cuda --n 64 128 --d 40000000 --dtype float32 bfloat16 --rules
  step host 60 "$python" scripts/bench_kernels.py --device cuda --rows host --n 16 --d 40000000 --repeats 3 --rules
fi
model=models/smollm2-135m-instruct
recipe="recipes/llm/smollm2_alpaca_chat.yaml model.name=$model"
[ -d "$model" ] && [ -z "$dry" ] || recipe="recipes/llm/alpaca_backdoor.yaml model.name=tiny data.max_length=128"
steps=$([ -n "$dry" ] && echo 2 || echo 30)
step lora_float32 60 "$python" scripts/bench_llm.py $recipe --steps "$steps"
if [ -z "$dry" ]; then
  step lora_bf16 60 "$python" scripts/bench_llm.py $recipe --steps "$steps" compute.mixed_precision=bf16
  if "$python" -c 'import bitsandbytes' 2>/dev/null; then
    step lora_4bit 90 "$python" scripts/bench_llm.py $recipe --steps "$steps" model.load_in_4bit=true compute.mixed_precision=bf16
  else
    echo "-- lora_4bit left out: bitsandbytes is not installed."
  fi
fi
exit $status

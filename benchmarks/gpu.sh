#!/usr/bin/env bash
# What is checked and measured on a GPU, in one command:  benchmarks/gpu.sh [NAME]
#
# Runs the cuda tests, the suite's workloads against the peers that are there, and the count of launches, and writes
# benchmarks/results/{suite,launches}_NAME.md. Needs a CUDA device, torch >= 2.11, pytest and pytest-benchmark; JAX and optax compete where they
# are there, and so does `higher`, from a folder too:
#
#     pip install --no-deps --target build/peers higher==0.2.1 optax chex
#
# Every part has a limit of its own, in all 8 minutes; a part that fails is named at the end, and the others run all the same.
# DEVICE=cpu tries the script itself where there is no GPU (SHARE, CALLS: how much of it).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DEVICE=${DEVICE:-cuda}
SHARE=${SHARE:-0.5}
CALLS=${CALLS:-1000}
WORKLOADS=${WORKLOADS:-"sine sine-tasks conv4-5shot conv4-tasks transformer"}
PYTHON=${PYTHON:-python3}
NAME=${1:-}
export PYTHONPATH="$PWD:$PWD/build/peers${PYTHONPATH:+:$PYTHONPATH}"
# JAX takes three quarters of the memory otherwise.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_COMPILATION_CACHE_DIR="$PWD/build/jax" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
mkdir -p build
failed=()

part() { # name, seconds, command
  local name=$1 seconds=$2
  shift 2
  echo "== $name (at most $seconds s)"
  local began=$SECONDS
  timeout -s INT -k 10 "$seconds" "$@" || failed+=("$name (exit status $?)")
  echo "== $name took $((SECONDS - began)) s"
}

"$PYTHON" - "$DEVICE" <<'PY' || exit 1
import sys, torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("gpu.sh: no CUDA device was found; DEVICE=cpu tries the script without one")
print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
PY

suite() { # workload, JSON, share
  "$PYTHON" -m pytest -o python_files='bench_*.py' -o filterwarnings=default -q --show-capture=no --tb=short benchmarks/suite/bench_latency.py \
    -k "$1-adapt or $1-meta" --quantities "adapt;meta" --device "$DEVICE" --share "$3" \
    --entrants "${ENTRANTS:-eager loop;torch.func;higher;JAX jit + optax;adaptrt;adaptrt, bfloat16}" --benchmark-json="$2"
}
everything() { # compiled once by everybody, side by side; what is timed later finds it on disk
  trap 'kill $(jobs -p) 2>/dev/null' EXIT # in the background they do not mind an interrupt
  for workload in $WORKLOADS; do
    suite "$workload" /dev/null 0.001 >"build/gpu-warm-$workload.log" 2>&1 &
  done
  "$PYTHON" -m pytest --benchmark-disable -q --show-capture=no --tb=short -m cuda tests/test_cudagraph.py tests/test_precision.py
  local status=$?
  wait
  return "$status"
}
export -f suite everything
export PYTHON DEVICE WORKLOADS ENTRANTS

part "tests, and compiling" 200 bash -c everything

# A process for each workload, so that one that fails or takes too long leaves the others' results.
json=()
for workload in $WORKLOADS; do
  out="build/gpu-$workload.json"
  rm -f "$out"
  part "suite: $workload" 36 bash -c 'suite "$@"' suite "$workload" "$out" "$SHARE"
  [ -s "$out" ] && json+=("$out")
done
if [ ${#json[@]} -gt 0 ]; then
  part "report" 15 "$PYTHON" -m benchmarks.suite.report "${json[@]}" --command "benchmarks/gpu.sh" ${NAME:+--name "$NAME"}
fi

part "launches" 75 "$PYTHON" benchmarks/launches.py --device "$DEVICE" --calls "$CALLS" --workloads $WORKLOADS ${NAME:+--name "$NAME"}

if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi

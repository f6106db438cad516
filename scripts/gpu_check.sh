#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and in the order in which it tells most: whether the instructions do
# what the emulator says, whether memory and threads are in order, whether the Hopper loop is as fast as predicted; then all
# GPU tests and the benchmarks, whose results go to benchmarks/results/<gpu>.json. A step that fails, or hangs, does not
# stop the next ones. The last page is the verdict; it and the logs are in build/gpu_check/. Needs Python with torch, pytest,
# hypothesis, pybind11, cmake, ninja, rich and typer, and nvcc; uses compute-sanitizer and ncu where they are installed; no network.
#
#     PYTHON=python3 scripts/gpu_check.sh            about 10 minutes; the benchmarks without torch.compile among the peers
#     BENCH=full scripts/gpu_check.sh                with it, and the models of other libraries (tens of minutes)
#     BENCH=no scripts/gpu_check.sh
#     scripts/gpu_check.sh --rehearse                without a GPU: every line, in a copy of the tree, against stand-ins
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "gpu_check: there is no ${PYTHON:-python3}"; exit 1; }
[ "${PYTHON#/}" != "$PYTHON" ] || PYTHON=$PWD/$PYTHON  # .venv/bin/python, say: a rehearsal runs in another folder
REHEARSE= SLOW=1
case ${1:-} in
  --rehearse) REHEARSE=1 ;;
  '') ;;
  *) echo "gpu_check: unknown argument $1; --rehearse or none"; exit 2 ;;
esac
if [ "$REHEARSE" ]; then
  # shellcheck source=gpu_rehearsal.sh
  . scripts/gpu_rehearsal.sh || exit 1
fi
# All that is missing at once, before anything is built.
missing=
for program in nvcc cmake ninja nvidia-smi; do
  command -v "$program" >/dev/null || missing="$missing $program"
done
for package in torch pytest hypothesis numpy pybind11 rich typer; do
  "$PYTHON" -c "import $package" 2>/dev/null || missing="$missing python:$package"
done
[ -z "$missing" ] || { echo "gpu_check: missing:$missing"; exit 1; }
OUT=build/gpu_check
rm -rf "$OUT"
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
failed=0

# step NAME SECONDS COMMAND...: its output to a file and to the screen; its status and time to the table of the verdict.
step() {
  local name=$1 limit=$(($2 * SLOW)) begin=$SECONDS status
  shift 2
  echo "== $name"
  if [ "$(type -t "$1")" = function ]; then
    "$@" 2>&1 | tee "$OUT/$name.log"
  else
    timeout -k 10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  fi
  status=${PIPESTATUS[0]}
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - begin))" >>"$OUT/steps.tsv"
  [ "$status" = 0 ] || { echo "== $name FAILED ($status)"; failed=1; }
  return "$status"
}

without() {  # without NAME WHY
  echo "== $1: left out, $2"
  printf '%s\t%s\t0\n' "$1" "left out: $2" >>"$OUT/steps.tsv"
}

checks() {  # checks NAME SECONDS [WRAPPER...] -- PYTEST ARGUMENTS...: GPU tests
  local name=$1 limit=$2 wrapper=()
  shift 2
  while [ "$1" != -- ]; do
    wrapper+=("$1")
    shift
  done
  shift
  step "$name" "$limit" ${wrapper[@]+"${wrapper[@]}"} "$PYTHON" -m pytest -q -n0 -m gpu --durations=5 \
    "--junitxml=$OUT/$name.xml" "$@"
}

compile() {  # compile FOLDER FLAGS: the native module, for the GPU found
  cmake -S . -B "$1" -G Ninja -DCMAKE_BUILD_TYPE=Release -DVTOK_FAST_CUDA_ARCHS=native "-DCMAKE_CUDA_FLAGS=$2" \
    "-DPython_EXECUTABLE=$PYTHON" "-Dpybind11_DIR=$("$PYTHON" -m pybind11 --cmakedir)" && cmake --build "$1"
}

build() {
  local made
  compile "$OUT/cmake" "" || return 1
  made=$(ls "$OUT"/cmake/_C*.so) || return 1
  cp "$made" vtok_fast/.built.so && rm -f vtok_fast/_C*.so && mv vtok_fast/.built.so "vtok_fast/$(basename "$made")"
}

loops() {  # the pipelined loop of the Hopper convolution against the one that waits for each group
  compile "$OUT/drained" -DVTOK_SM90_DRAINED &&
    "$PYTHON" scripts/time_hopper_loops.py "$OUT/loops.json" "$OUT"/cmake/_C*.so "$OUT"/drained/_C*.so
}

export PYTHONPATH=$PWD:$OUT/site:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
# vtok_fast.kernels is the folder kernels/: an installation maps it, here a link does.
mkdir -p "$OUT/site" && ln -sfn ../kernels vtok_fast/kernels
finish() {
  rm -f vtok_fast/kernels
  [ -z "$REHEARSE" ] || rm -rf "$REHEARSAL"
}
trap finish EXIT

"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "gpu_check: torch sees no GPU"; exit 1; }
step nvidia-smi 60 nvidia-smi
if ! step build 1200 build; then
  "$PYTHON" scripts/gpu_verdict.py "$OUT"
  exit 1
fi
step info 120 "$PYTHON" -m vtok_fast.cli info
HOPPER=$("$PYTHON" -c 'import torch; print(int(torch.cuda.get_device_capability() == (9, 0)))')

# 1. Instructions: each differs here from the emulator, or all that follows is a kernel's fault.
checks conformance 300 -- tests/emulator/test_conformance.py
# 2. Memory, on small shapes.
SMALL="test_splits or test_strides or test_infinities or test_input_gradient or test_first_call or test_cache or test_every_layout"
FILES=(tests/ops/test_causal_conv3d_sm80_gpu.py tests/ops/test_causal_conv3d_sm90_gpu.py
  tests/ops/test_causal_conv3d_sm90_wgrad_gpu.py tests/ops/test_causal_conv3d_e4m3_gpu.py tests/ops/test_fsq_sm80.py)
if command -v compute-sanitizer >/dev/null; then
  checks memcheck 300 compute-sanitizer --tool memcheck --error-exitcode 9 -- "${FILES[@]}" -k "$SMALL"
  checks memcheck-triton 240 compute-sanitizer --tool memcheck --error-exitcode 9 -- \
    tests/ops/test_triton_graphs_gpu.py tests/ops/test_scope_attention_gpu.py -k "short or stream or numbers"
else
  without memcheck "there is no compute-sanitizer"
fi
# 3. Contexts, grants of shared memory, devices, graphs.
checks host 300 -- tests/ops/test_causal_conv3d_host_gpu.py
# 4. The loop.
if [ "$HOPPER" = 1 ]; then
  step loops 1500 loops
  if command -v ncu >/dev/null; then
    step ncu 300 ncu --target-processes all --kernel-name regex:conv_sm90_kernel --launch-count 4 --metrics \
      sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active,l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum,lts__throughput.avg.pct_of_peak_sustained_elapsed \
      "$PYTHON" scripts/time_hopper_loops.py "$OUT/ncu.json" "$OUT"/cmake/_C*.so
  else
    without ncu "it is not installed"
  fi
else
  without loops "the GPU is not a Hopper"
fi
# 5. Everything.
checks tests 900 -- tests
bench() {
  "$PYTHON" -m vtok_fast.cli bench --device "$DEVICE" --output benchmarks/results --plot "$OUT/roofline.png" "$@"
}
DEVICE=${DEVICE:-cuda}
OPS=${OPS:-causal_conv3d norm_act fsq scope_attention token_packing vidtok}
case ${BENCH:-short} in
  no) without bench "BENCH=no" ;;
  full) step bench 7200 bench ;;
  # shellcheck disable=SC2086
  *) step bench 1200 bench $OPS --no-compile --seconds 0.1 ;;
esac
if [ "${BENCH:-short}" != no ]; then
  step tune 600 "$PYTHON" -m vtok_fast.cli tune vidtok/tiny --size 17x64x64 --quick --device "$DEVICE" --output "$OUT/tuned.json"
  for op in scope_attention norm_act token_packing; do
    step "tune-$op" 300 "$PYTHON" -m vtok_fast.cli tune "$op" --quick --device "$DEVICE" --output "$OUT/tuned.json"
  done
fi
"$PYTHON" scripts/gpu_verdict.py "$OUT"
exit "$failed"

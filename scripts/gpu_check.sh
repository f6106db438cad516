#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command: builds for the GPU found, then runs the tests that need one, the conformance
# programs among them, a short subset under compute-sanitizer where that is installed, and the benchmarks, whose results go to
# benchmarks/results/<gpu>.json. Needs Python with torch, pytest, hypothesis, pybind11, cmake, ninja, rich and typer, and nvcc; no
# network. The report goes to build/gpu_check/.
#
#     PYTHON=python3 scripts/gpu_check.sh            under 8 minutes; the benchmarks without torch.compile among the peers
#     BENCH=full scripts/gpu_check.sh                with it, and the models of other libraries (tens of minutes)
#     BENCH=no scripts/gpu_check.sh
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=build/gpu_check
mkdir -p "$OUT"
failed=0

step() {  # step NAME COMMAND...: its output to a file and to the screen, and on after a failure
  local name=$1
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$OUT/$name.log"
  local status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || { echo "== $name FAILED ($status)"; failed=1; }
  return "$status"
}

build() {
  cmake -S . -B "$OUT/cmake" -G Ninja -DCMAKE_BUILD_TYPE=Release -DVTOK_FAST_CUDA_ARCHS=native \
    -DPython_EXECUTABLE="$(command -v "$PYTHON")" -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" &&
    cmake --build "$OUT/cmake" && cp "$OUT"/cmake/_C*.so vtok_fast/.built.so && rm -f vtok_fast/_C*.so &&
    mv vtok_fast/.built.so "vtok_fast/$(basename "$OUT"/cmake/_C*.so)"
}

export PYTHONPATH=$PWD:$OUT/site
# vtok_fast.kernels is the folder kernels/: an installation maps it, here a link does.
mkdir -p "$OUT/site" && ln -sfn ../kernels vtok_fast/kernels
trap 'rm -f vtok_fast/kernels' EXIT

"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "gpu_check: torch sees no GPU"; exit 1; }
nvidia-smi | tee "$OUT/nvidia-smi.log"
step build build || exit 1
step info "$PYTHON" -m vtok_fast.cli info
step tests "$PYTHON" -m pytest -q -m gpu --durations=15
if command -v compute-sanitizer >/dev/null; then
  step sanitizer timeout 120 compute-sanitizer --error-exitcode 9 "$PYTHON" -m pytest -q -m gpu tests/ops/test_fsq_sm80.py -k test_every_layout
  step sanitizer-triton timeout 240 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m pytest -q -m gpu \
    tests/ops/test_triton_graphs_gpu.py tests/ops/test_scope_attention_gpu.py -k "short or stream or numbers"
fi
bench() {
  "$PYTHON" -m vtok_fast.cli bench --device cuda --output benchmarks/results --plot "$OUT/roofline.png" "$@"
}
OPS="causal_conv3d norm_act fsq scope_attention token_packing vidtok"
case ${BENCH:-short} in
  no) exit $failed ;;
  full) step bench bench ;;
  *) step bench bench $OPS --no-compile --seconds 0.1 ;;
esac
step tune "$PYTHON" -m vtok_fast.cli tune vidtok/tiny --size 17x64x64 --quick --device cuda --output "$OUT/tuned.json"
step tune-triton bash -c "for op in scope_attention norm_act token_packing; do
  $PYTHON -m vtok_fast.cli tune \$op --quick --device cuda --output $OUT/tuned.json || exit 1; done"
exit $failed

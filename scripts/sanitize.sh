#!/usr/bin/env bash
# A build of the native module with ASan and UBSan, beside the installed one, and on it the tests of the CPU kernels or the fuzzer:
#   scripts/sanitize.sh tests [pytest's arguments]
#   scripts/sanitize.sh fuzz [seconds] [seed]
# The build is in build/sanitize. What is found ends the process with a stack.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
build=build/sanitize
tools=$PWD/$build/tools  # what .venv lacks: the build is an isolated one there
export PATH=$tools/bin:$PATH PYTHONPATH=$tools
find_pybind11() { "$python" -c 'import pybind11; print(pybind11.get_cmake_dir())' 2>/dev/null; }
pybind11=$(find_pybind11) || {
  "$python" -m pip --disable-pip-version-check --quiet install --target "$tools" "pybind11>=2.13" "cmake>=3.20" ninja
  pybind11=$(find_pybind11)
}
generator=$(command -v ninja >/dev/null && echo Ninja || echo "Unix Makefiles")
cmake -S . -B "$build" -G "$generator" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" \
  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
  -DVTOK_FAST_CUDA_ARCHS=none -Dpybind11_DIR="$pybind11" -DPython_EXECUTABLE="$python" >"$build.log"
cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}" >>"$build.log" || { tail -30 "$build.log"; exit 1; }

# Python itself is not built so: the runtimes come first. It leaks on purpose at its end, so leaks are not looked for. One test has 6 GiB
# of memory that it does not touch; what the fuzzer asks for in vain should fail at once.
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_odr_violation=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export VTOK_FAST_NATIVE_UNDER_TEST=$(echo "$PWD/$build"/_C*.so) PYTHONPATH=$PWD/tests/robustness OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
what=${1:-tests}
shift || true
case $what in
  tests)
    failed=0
    for op in causal_conv3d causal_conv3d_native winograd_native weight_cache norm_act fsq token_packing; do
      LD_PRELOAD=$preload PYTHONPATH=tests "$python" -m pytest -p support.another_native -p no:cacheprovider -q -m "not slow and not gpu" --capture=sys \
        "tests/ops/test_$op.py" "$@" || failed=1
    done
    exit $failed ;;
  fuzz)
    seconds=${1:-600}
    seed=${2:-$RANDOM}
    export ASAN_OPTIONS=$ASAN_OPTIONS:max_allocation_size_mb=4096
    for target in native packed tokens results; do
      LD_PRELOAD=$preload PYTHONPATH=tests "$python" -m support.fuzz "$target" --seconds "$seconds" --seed "$seed"
    done ;;
  *) sed -n 2,5p "$0"; exit 2 ;;
esac

#!/usr/bin/env bash
# The C++ kernels under the sanitizers of GCC: lipgan._C with AddressSanitizer and UndefinedBehaviorSanitizer, built into a
# temporary folder and used by the tests of the ops and by the fuzz; then a program that calls the kernels from many
# threads under ThreadSanitizer.
#
#   scripts/sanitize.sh            every instruction set that this processor has; the tests of the ops
#   scripts/sanitize.sh --short    the baseline instruction set, and a selection: for every change
#
# Environment: PYTHON (default .venv/bin/python), CXX (default g++), FUZZ_SECONDS (default 120, short 15), SEED.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python} cxx=${CXX:-g++}
short=0
[[ ${1:-} == --short ]] && short=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

flags=(-std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -fopenmp-simd -fno-omit-frame-pointer -Icsrc -Icsrc/include
  -Wall -Wextra -Wshadow -Wconversion -Wsign-conversion -Werror)
kernels=(gradient_penalty matrix_sqrt mlp_gradient_penalty nearest_neighbours polar_factor spectral_norm spectral_norm_backward
  spectral_norm_double_backward symmetrize)
bindings=(bindings gradient_penalty matrix_sqrt mlp_gradient_penalty nearest_neighbours polar_factor spectral_norm symmetrize)
isas=(baseline)
if ((short)) || [[ $(uname -m) != x86_64 ]]; then
  flags+=(-DLIPGAN_BASELINE_ONLY)
else
  isas+=(avx2 avx512)
fi
declare -A isa_flags=([baseline]="" [avx2]="-mavx2 -mfma -mf16c"
  [avx512]="-mavx2 -mfma -mf16c -mavx512f -mavx512dq -mavx512bw -mavx512vl -Wno-maybe-uninitialized")

# compile SANITIZERS FOLDER ISA...: the objects of csrc/cpu, as many at a time as there are processors
compile() {
  local sanitizers=$1 folder=$2 isa kernel
  shift 2
  mkdir -p "$folder"
  {
    for isa in "$@"; do
      for kernel in "${kernels[@]}"; do
        echo "${flags[*]} $sanitizers ${isa_flags[$isa]} -DLIPGAN_ISA=$isa -c csrc/cpu/$kernel.cpp -o $folder/$kernel.$isa.o"
      done
    done
    for kernel in memory threads; do
      echo "${flags[*]} $sanitizers -c csrc/cpu/$kernel.cpp -o $folder/$kernel.o"
    done
    cat
  } | xargs -P "$(nproc)" -L 1 "$cxx"
}

echo "== lipgan._C with AddressSanitizer and UndefinedBehaviorSanitizer (${isas[*]}; $SECONDS s)"
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=all"
includes=$("$python" -m pybind11 --includes | sed 's/-I/-isystem /g')
{
  echo "${flags[*]} $sanitizers -c csrc/cpu/isa.cpp -o $scratch/asan/isa.o"
  for binding in "${bindings[@]}"; do
    echo "${flags[*]} $sanitizers $includes -c csrc/python/$binding.cpp -o $scratch/asan/python_$binding.o"
  done
} | compile "$sanitizers" "$scratch/asan" "${isas[@]}"
suffix=$("$python" -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
# shellcheck disable=SC2086
"$cxx" -shared $sanitizers "$scratch"/asan/*.o -ldl -pthread -o "$scratch/_C$suffix"
# Every Python that starts takes this module for lipgan._C.
cat >"$scratch/sitecustomize.py" <<END
import importlib.util, sys
spec = importlib.util.spec_from_file_location("lipgan._C", "$scratch/_C$suffix")
module = sys.modules["lipgan._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
END
sanitized() {
  # Python itself leaks, so leaks are not looked for. A report ends in abort(), and Python prints the lines it was at;
  # the frames of the interpreter, which the fast unwinder does not see, would hide those of the kernel.
  local options=abort_on_error=1:fast_unwind_on_fatal=1
  LD_PRELOAD="$("$cxx" -print-file-name=libasan.so):$("$cxx" -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:$options UBSAN_OPTIONS=print_stacktrace=1:$options PYTHONFAULTHANDLER=1 \
    PYTHONPATH="$scratch${PYTHONPATH:+:$PYTHONPATH}" LIPGAN_TEST_POISON=1 "$@"
}
# Otherwise the runs below would say nothing.
sanitized "$python" -c "from lipgan import _C; assert _C.__file__.startswith('$scratch/'), _C.__file__"

echo "== the tests of the ops ($SECONDS s)"
# --capture=sys leaves the file descriptors alone: a report that pytest had captured would end with the process.
if ((short)); then
  sanitized "$python" -m pytest --capture=sys tests/ops/test_storage.py -k native
else
  sanitized "$python" -m pytest --capture=sys tests/ops -k "native and not compiled and not opcheck"
fi

echo "== the fuzz ($SECONDS s)"
sanitized "$python" tests/harness/fuzz.py --seconds "${FUZZ_SECONDS:-$((short ? 15 : 120))}" ${SEED:+--seed "$SEED"}

echo "== the kernels from many threads, with ThreadSanitizer ($SECONDS s)"
sanitizers="-fsanitize=thread"
compile "$sanitizers" "$scratch/tsan" baseline <<END
${flags[*]} $sanitizers -c tests/csrc/threads_driver.cpp -o $scratch/tsan/driver.o
END
"$cxx" $sanitizers "$scratch"/tsan/*.o -ldl -pthread -o "$scratch/threads_driver"
TSAN_OPTIONS=halt_on_error=1 "$scratch/threads_driver" "$((short ? 3 : 30))"
echo "== done ($SECONDS s)"

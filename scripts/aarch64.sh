#!/usr/bin/env bash
# The C++ kernels on aarch64: compiled by a cross compiler, run by an emulator of the processor.
#
#   scripts/aarch64.sh            the kernels with warnings as errors, and a program that calls them from many threads
#   scripts/aarch64.sh --tests    lipgan._C as well, and the tests of the ops, which compare it with the reference; half an
#                                 hour on one core. The first time, a Python and the oldest PyTorch for aarch64 (later
#                                 ones bring CUDA along) come to build/aarch64: 400 MB, from apt-get and pip
#
# Needs Debian's packages g++-aarch64-linux-gnu and qemu-user. Environment: PYTHON (default .venv/bin/python), TESTS (what
# pytest runs; default tests/ops).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python} folder=$PWD/build/aarch64 cross=aarch64-linux-gnu-g++
for tool in "$cross" qemu-aarch64 cmake ninja; do
  command -v "$tool" >/dev/null || { echo "scripts/aarch64.sh needs $tool" >&2; exit 1; }
done
# Where the emulated programs find their libraries.
export QEMU_LD_PREFIX=/usr/aarch64-linux-gnu
mkdir -p "$folder"

# configure FOLDER OPTION...: CMake's build of lipgan._C for aarch64, with the headers of Python in $headers
configure() {
  cmake -S . -B "$1" -G Ninja -DCMAKE_BUILD_TYPE=Release -DLIPGAN_WERROR=ON -DLIPGAN_OUTPUT_DIR="$folder/module" \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER="$cross" \
    -DPython_EXECUTABLE="$python" -DPython_INCLUDE_DIR="$headers" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" "${@:2}" >"$folder/cmake.log" ||
    { cat "$folder/cmake.log"; exit 1; }
}

echo "== the kernels ($SECONDS s)"
# The kernels include no header of Python; CMake wants to see some all the same.
headers=$("$python" -c "import sysconfig; print(sysconfig.get_path('include'))")
configure "$folder/kernels"
ninja -C "$folder/kernels" kernels_baseline
echo "== from many threads: each result is that of one thread ($SECONDS s)"
"$cross" -std=c++17 -O1 -fopenmp-simd -Wall -Wextra -Werror -Icsrc -Icsrc/include tests/csrc/threads_driver.cpp \
  csrc/cpu/{memory,threads}.cpp "$folder"/kernels/CMakeFiles/kernels_baseline.dir/csrc/cpu/*.o -ldl -pthread \
  -o "$folder/threads_driver"
qemu-aarch64 "$folder/threads_driver" 1
if [[ ${1:-} != --tests ]]; then
  echo "== done ($SECONDS s)"
  exit
fi

system=$folder/system site=$folder/site
version=$(apt-cache show python3 | sed -n 's/^Version: \([0-9]*\.[0-9]*\).*/\1/p' | head -n 1)
if [[ ! -e $folder/complete ]]; then
  echo "== Python $version and PyTorch for aarch64 ($SECONDS s)"
  # A packet manager's state of its own: nothing is installed on this machine.
  state=$folder/apt
  rm -rf "$state" "$system" "$site"
  mkdir -p "$state"/{lists,archives}/partial "$system"
  touch "$state/status"
  options=(-qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root
    -o "Dir::State=$state" -o "Dir::State::status=$state/status" -o "Dir::Cache=$state" -o Debug::NoLocking=1)
  apt-get "${options[@]}" update
  apt-get "${options[@]}" install --download-only --no-install-recommends --yes \
    "python$version" "libpython$version-dev" libstdc++6 libgomp1
  for package in "$state"/archives/*.deb; do dpkg -x "$package" "$system"; done
  oldest=$(sed -n 's/^ *"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
  # --no-deps for torch: what pip would choose by the machine it runs on is chosen by hand.
  platforms=(--only-binary :all: --no-compile --python-version "$version" --target "$site")
  for glibc in 17 27 28; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
  "$python" -m pip install --quiet "${platforms[@]}" numpy scipy scikit-learn pillow tqdm safetensors matplotlib mido \
    pytest hypothesis mpmath filelock typing-extensions sympy networkx jinja2 fsspec
  "$python" -m pip install --quiet --no-deps --upgrade "${platforms[@]}" "torch==$oldest.*"
  touch "$folder/complete"
fi
export QEMU_LD_PREFIX=$system

echo "== lipgan._C ($SECONDS s)"
suffix=.cpython-${version/./}-aarch64-linux-gnu.so
# Debian's Python.h asks for a header by the name of the machine.
mkdir -p "$folder/include/aarch64-linux-gnu"
ln -sfn "$system/usr/include/aarch64-linux-gnu/python$version" "$folder/include/aarch64-linux-gnu/python$version"
headers=$system/usr/include/python$version
configure "$folder/python" -DCMAKE_CXX_FLAGS="-isystem $folder/include" -DPYTHON_MODULE_EXTENSION="$suffix"
ninja -C "$folder/python"
# Every Python that starts takes this module for lipgan._C.
mkdir -p "$folder/start"
cat >"$folder/start/sitecustomize.py" <<END
import importlib.util, sys
spec = importlib.util.spec_from_file_location("lipgan._C", "$folder/module/_C$suffix")
module = sys.modules["lipgan._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
END

echo "== the tests of the ops ($SECONDS s)"
# shellcheck disable=SC2086  (several files)
PYTHONPATH=$folder/start:$site:$PWD qemu-aarch64 "$system/usr/bin/python$version" -m pytest -p no:cacheprovider \
  -m "not slow" -k "native and not compiled and not opcheck" ${TESTS:-tests/ops}
echo "== done ($SECONDS s)"

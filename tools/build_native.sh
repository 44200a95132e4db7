#!/usr/bin/env bash
# Rebuilds shoal/_kernels in place after a change of kernels/: the quick loop of kernel work.
# `make` targets do the same through pip; this one keeps its objects in build/dev.
set -euo pipefail
cd "$(dirname "$0")/.."
bin="$PWD/.venv/bin"
"$bin/cmake" -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DPython_EXECUTABLE="$bin/python" -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
  -Dnanobind_DIR="$("$bin/python" -m nanobind --cmake_dir)" >build/dev-configure.log 2>&1 \
  || { cat build/dev-configure.log; exit 1; }
"$bin/ninja" -C build/dev -j"${JOBS:-2}"
cp build/dev/_kernels*.so shoal/

#!/usr/bin/env bash
# Builds shoal/_kernels*.so in place.  Quick when nothing changed: ninja decides, and runs cmake
# again when CMakeLists.txt changed or a kernel file appeared.
set -euo pipefail
cd "$(dirname "$0")/.."
bin="$PWD/.venv/bin"
jobs="${JOBS:-$(getconf _NPROCESSORS_ONLN)}"

if ! [ -f build/dev/build.ninja ]; then
  mkdir -p build
  "$bin/cmake" -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DPython_EXECUTABLE="$bin/python" -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
    -Dnanobind_DIR="$("$bin/python" -m nanobind --cmake_dir)" >build/dev-configure.log 2>&1 || {
    cat build/dev-configure.log >&2
    echo "error: the build could not be configured: it needs a C++17 compiler and Python's headers" >&2
    echo "       (Debian, Ubuntu: apt install g++ python3-dev; macOS: xcode-select --install)" >&2
    exit 1
  }
fi
"$bin/ninja" -C build/dev --quiet -j"$jobs"

for module in build/dev/_kernels*.so; do
  target="shoal/$(basename "$module")"
  if ! cmp -s "$module" "$target"; then
    # By rename: overwriting a library in place would crash the processes that have it mapped.
    cp "$module" "$target.new" && mv -f "$target.new" "$target"
  fi
done

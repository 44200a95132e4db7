#!/usr/bin/env bash
# Makes .venv at the repository's root: a virtual environment with shoal (editable) and its tools.
set -euo pipefail
cd "$(dirname "$0")/.."

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if ! [ -x .venv/bin/python ] || ! new_enough .venv/bin/python; then
  found=""
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
      found="$candidate"
      break
    fi
  done
  if [ -z "$found" ]; then
    echo "error: shoal needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.12 ..." >&2
    exit 1
  fi
  echo "making .venv with $("$found" --version)"
  if ! "$found" -m venv --clear .venv; then
    echo "error: $found cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)" >&2
    exit 1
  fi
  rm -rf build/dev # it remembers the Python that it was configured for
fi

echo "installing what shoal and its checks need (a minute or two, once)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
touch .venv/.installed

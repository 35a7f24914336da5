#!/usr/bin/env bash
# Exports the block, builds the C++ program and runs it: bash examples/aot_cpp/run.sh [FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-build/aot}
python "$here/../export_aot.py" "$out"
cmake -S "$here" -B "$out/cpp" -DCMAKE_BUILD_TYPE=Release \
  -DTORCH_ROOT="$(python -c 'import torch; print(torch.__path__[0])')"
cmake --build "$out/cpp" --parallel 2
"$out/cpp/aot_block" "$out"

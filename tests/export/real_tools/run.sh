#!/usr/bin/env bash
# Carries plans out with the real tools: a virtual environment of its own for each, then its test.
#   tests/export/real_tools/run.sh              all targets
#   tests/export/real_tools/run.sh gguf mlx     some of them
#   INSTALL_ONLY=1 tests/export/real_tools/run.sh autoround gptqmodel   for `python -m benchmarks.inference`
set -euo pipefail
cd "$(dirname "$0")/../../.."
export HF_HUB_OFFLINE=1 GPTQMODEL_CPU_WORKERS=2  # GPTQModel stops on two cores without it

declare -A needs=(
  [autoround]="auto-round==0.16.1"
  [gptqmodel]="gptqmodel==7.6.0"
  [llm_compressor]="compressed-tensors==0.20.0 accelerate loguru"
  [gguf]="gguf==0.19.0 cmake"
  [mlx]="mlx[cpu]==0.32.4 mlx-lm==0.32.2"
  [torchao]="torchao==0.18.0"
  [modelopt]="nvidia-modelopt==0.47.0 requests"
  [dynquant]="dynquant-core==0.5.3 accelerate"
  [lm_eval]="lm-eval==0.4.13 accelerate"
)
order=(autoround gptqmodel llm_compressor gguf mlx torchao modelopt dynquant lm_eval)

install() {
  local name=$1 bin=.venv-exports/$1/bin constraints=constraints.txt
  [ -f ".venv-exports/$name/installed" ] && return
  "${PYTHON:-python3}" -m venv ".venv-exports/$name"
  if [ "$name" = gptqmodel ]; then  # it wants other versions than ours
    "$bin/python" -m pip install -q -c constraints.txt torch setuptools wheel ninja packaging
    grep -E '^torch==' constraints.txt > .venv-exports/gptqmodel/constraints.txt
    constraints=.venv-exports/gptqmodel/constraints.txt
  fi
  # shellcheck disable=SC2086
  "$bin/python" -m pip install -q -c "$constraints" torch -e . pytest ${needs[$name]}
  if [ "$name" = llm_compressor ]; then  # its own pins exclude the transformers that it runs with
    "$bin/python" -m pip install -q --no-deps llmcompressor==0.14.0.1
  fi
  if [ "$name" = gguf ]; then build_llama_quantize "$bin"; fi
  touch ".venv-exports/$name/installed"
}

build_llama_quantize() {
  local folder=.venv-exports/gguf/llama
  mkdir -p "$folder"
  "$1/python" -m pip download -q --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d "$folder"
  tar xzf "$folder"/*.tar.gz -C "$folder" --strip-components=1
  "$1/cmake" -S "$folder/vendor/llama.cpp" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DBUILD_SHARED_LIBS=OFF -DGGML_OPENMP=OFF \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
  "$1/cmake" --build "$folder/build" --target llama-quantize -j "$(nproc)"
}

export LLAMA_QUANTIZE=$PWD/.venv-exports/gguf/llama/build/bin/llama-quantize
[ $# -gt 0 ] || set -- "${order[@]}"
for name in "$@"; do
  echo "== $name"
  install "$name"
  [ -n "${INSTALL_ONLY:-}" ] || ".venv-exports/$name/bin/python" -m pytest -p no:cacheprovider "tests/export/real_tools/test_$name.py"
done

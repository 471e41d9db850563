#!/bin/sh
# Make the virtual environment and install petals in it with the versions that were tested.
#
# torch comes first and by itself: on Linux the build on PyPI drags in several gigabytes of CUDA
# libraries. The version "+cpu" cannot match that build, so a machine without an NVIDIA GPU gets
# the CPU build or nothing. TORCH=torch==2.13.0 overrules the choice.
set -eu

PYTHON=${PYTHON:-python3.11}
VENV=${VENV:-.venv}
TORCH_VERSION=$(sed -n 's/^torch==//p' constraints.txt)
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

command -v "$PYTHON" >/dev/null 2>&1 || PYTHON=python3
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "petals needs Python 3.11 or newer; $PYTHON is older." >&2
    echo "hint: make PYTHON=/path/to/python3.11 install" >&2
    exit 1
}

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip "$@"; }

wants_cpu_build() {
    [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 && [ ! -e /dev/nvidia0 ]
}

if [ -n "${TORCH:-}" ]; then
    pip install "$TORCH"
elif wants_cpu_build; then
    CPU_TORCH="torch==$TORCH_VERSION+cpu"
    # First where pip already looks (a local wheel, a mirror), then at PyTorch's own index.
    pip install --quiet "$CPU_TORCH" 2>/dev/null ||
        pip install --extra-index-url "$TORCH_CPU_INDEX" "$CPU_TORCH" || {
            echo "No CPU build of torch $TORCH_VERSION was found." >&2
            echo "hint: open $TORCH_CPU_INDEX to pip, point pip's find-links at a CPU wheel," >&2
            echo "hint: or accept the CUDA build: TORCH=torch==$TORCH_VERSION make install" >&2
            exit 1
        }
else
    pip install "torch==$TORCH_VERSION"
fi

pip install --constraint constraints.txt --editable ".[dev]"

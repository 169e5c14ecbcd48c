#!/usr/bin/env bash
# environment.sh NAME [TORCH]: prints the python of an environment that holds exactly requirements/NAME.lock, made if
# there is none yet. It stands outside the tree under the lock's hash (SETS, by default ~/.cache/spinfast/sets): a changed
# lock is another environment, and what an interrupted install left is thrown away. PYTHON312, for colab PYTHON313: the
# interpreter to make it with. colab.lock comes on top of what Colab brings of what spinfast needs, in Colab's versions.
# With TORCH: an environment of links to it, that torch's wheel alone in place of the set's (of the same CUDA), and
# without what is compiled for the set's torch.
set -euo pipefail
lock="$(dirname "$0")/../../requirements/$1.lock"
home="${SETS:-$HOME/.cache/spinfast/sets}/$1-$(sha256sum "$lock" | cut -c1-16)"
# wheels alone: a user's machine has no compiler
install="-m pip install --quiet --disable-pip-version-check --no-cache-dir --only-binary :all: --no-deps"
if [ ! -e "$home/.installed" ]; then
  rm -rf "$home"
  if [ "$1" = colab ]; then
    "${PYTHON313:-python3.13}" -m venv "$home" >&2
    "$home/bin/python" ${install/--only-binary :all: --no-deps/} -c "${lock%.lock}-runtime.txt" \
      -r "${lock%.lock}.txt" torch transformers peft numba safetensors pydantic pyyaml rich tensorboard matplotlib \
      scikit-learn scipy pytest hypothesis pytest-benchmark >&2
  else
    "${PYTHON312:-python3.12}" -m venv "$home" >&2
  fi
  "$home/bin/python" $install --require-hashes -r "$lock" >&2
  touch "$home/.installed"
fi
packages=lib/python3.12/site-packages
if [ -n "${2:-}" ] && [ ! -e "$home/$packages/torch-$2.dist-info" ]; then
  set="$home" home="$home-torch-$2"
  if [ ! -e "$home/.installed" ]; then
    rm -rf "$home"
    "$set/bin/python" -m venv --without-pip "$home" >&2
    ln -s "$set/$packages"/* "$home/$packages"
    for name in torch vllm xformers unsloth flashinfer; do rm -f "$home/$packages/$name"*; done
    "$home/bin/python" $install "torch==$2" >&2
    touch "$home/.installed"
  fi
fi
echo "$home/bin/python"

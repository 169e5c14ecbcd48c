#!/usr/bin/env bash
# environment.sh NAME: prints the python of an environment that holds exactly requirements/NAME.lock, made if there is
# none yet. It stands outside the tree under the lock's hash (SETS, by default ~/.cache/spinfast/sets): a changed lock
# is another environment, and what an interrupted install left is thrown away. PYTHON312: the interpreter to make it with.
set -euo pipefail
lock="$(dirname "$0")/../../requirements/$1.lock"
home="${SETS:-$HOME/.cache/spinfast/sets}/$1-$(sha256sum "$lock" | cut -c1-16)"
if [ ! -e "$home/.installed" ]; then
  rm -rf "$home"
  "${PYTHON312:-python3.12}" -m venv "$home" >&2
  # wheels alone: a user's machine has no compiler
  "$home/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
    --only-binary :all: --no-deps --require-hashes -r "$lock" >&2
  touch "$home/.installed"
fi
echo "$home/bin/python"

#!/bin/sh
# Print the path of a Python >= 3.12 that can make a virtual environment. Without one, print what to install and fail.
# If $PYTHON is set, only that one is checked. Otherwise the script searches PATH, pyenv's versions folder, and then uv.

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" && command -v "$PYTHON" && exit 0
    echo "PYTHON=$PYTHON is not a Python >= 3.12 with venv, which Megatron's wheels need: found $("$PYTHON" -V 2>&1)" >&2
    exit 1
fi
for candidate in python3.12 python3.13 python3 python; do
    fits "$candidate" && command -v "$candidate" && exit 0
done
for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
    fits "$candidate" && echo "$candidate" && exit 0
done
if command -v uv >/dev/null; then
    uv python install -q 3.12 >&2
    candidate=$(uv python find 3.12 2>/dev/null) && fits "$candidate" && echo "$candidate" && exit 0
fi
echo "Found no Python >= 3.12, which Megatron's wheels need: install it (apt install python3.12-venv, pyenv install 3.12" \
    "or uv python install 3.12), or name one with make PYTHON=/path/to/python3.12" >&2
exit 1

#!/bin/sh
# Prints a Python of at least 3.12 that can make a virtual environment, or says what to install and fails.
# Looks at $PYTHON alone if that is set; else on PATH, in pyenv's versions folder, then asks uv.

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" && command -v "$PYTHON" && exit 0
    echo "PYTHON=$PYTHON is not a Python >= 3.12 with venv (Megatron's wheels need 3.12): $("$PYTHON" -V 2>&1)" >&2
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
echo "No Python >= 3.12 found, and Megatron's wheels need one: install it (apt install python3.12-venv," \
    "pyenv install 3.12 or uv python install 3.12), or name one with make PYTHON=/path/to/python3.12" >&2
exit 1

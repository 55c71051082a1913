# The launches of the kernels have changed. It runs until the text is there and beyond.
# seconds: 300
# needs: base
. scripts/offline/env.sh
python3 -m pytest -q -m gpu -p no:cacheprovider tests/kernels/test_hopper.py tests/kernels/test_sharded.py tests/kernels/test_step.py

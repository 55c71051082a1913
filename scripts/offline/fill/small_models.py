"""The small models of benchmarks/quality/needle.py and state_tracking.py."""

import runpy
import sys
from pathlib import Path

QUALITY = Path(__file__).resolve().parents[3] / "benchmarks" / "quality"
sys.path.insert(0, str(QUALITY))
for program in ("needle.py", "state_tracking.py"):
    sys.argv[1:] = ["--compile", "--out", "nothing.json"]
    runpy.run_path(str(QUALITY / program), run_name="__main__")

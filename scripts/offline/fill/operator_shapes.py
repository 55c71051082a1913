"""benchmarks/operator_times.py"""

import runpy
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
sys.argv[1:] = []
runpy.run_path(str(BENCHMARKS / "operator_times.py"), run_name="__main__")

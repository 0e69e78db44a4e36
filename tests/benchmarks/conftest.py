"""The scripts of ``benchmarks`` import one another by name, as ``python benchmarks/x.py`` does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

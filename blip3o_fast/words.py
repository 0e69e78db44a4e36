"""Words that options, functions and files share.

Here because command lines must know them without importing torch.
"""

from typing import Literal

DeviceName = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["fp32", "bf16", "fp16"]
GridName = Literal["ascending", "published", "published_trainer"]
SolverName = Literal[
    "euler",
    "heun",
    "midpoint",
    "rk4",
    "adams_bashforth2",
    "adams_bashforth3",
    "adams_bashforth4",
    "fitted",
]
"""A name of ``flow.SOLVERS``, or ``fitted``."""
PairName = Literal["clip+eva", "lite"]

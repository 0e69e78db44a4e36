"""What a static model predicts of the Triton kernels, to stand beside what is measured.

``kernels/predict_kernels.py --bench`` writes the file from the machine code of the kernels. It
needs the compilers, which this package does not, so the file is kept. A digest of the kernels'
sources tells whether they are still those that were predicted.
"""

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from blip3o_fast.benchmarking.cases import Task

PREDICTIONS = Path(__file__).with_name("predictions.json")
CONTENDER = "triton"
DTYPE = "bf16"


class Predictions(NamedTuple):
    """The predictions for one device.

    Attributes:
        about: for which device and from what, in one line.
        fractions: of the bandwidth of a copy, by ``Shape.name`` and ``Task.name``.
    """

    about: str
    fractions: Mapping[str, Mapping[str, float]]

    def fraction(self, task: Task, contender: str) -> float | None:
        """Of an op by Triton; None where nothing was predicted."""
        if (task.group, task.dtype, contender) != ("ops", DTYPE, CONTENDER):
            return None
        return self.fractions.get(task.shape, {}).get(task.name)


def find_predictions(architecture: int, bandwidth: float) -> Predictions:
    """The predictions for the known GPU of an architecture whose copy is nearest in bandwidth.

    Args:
        architecture: 90 for sm_90.
        bandwidth: of a copy on the device, in B/s.
    """
    content = read_predictions()
    gpus = [gpu for gpu in content["gpus"] if gpu["architecture"] == architecture]
    if not gpus:
        return Predictions(f"nothing is predicted for sm_{architecture}", {})
    nearest = min(gpus, key=lambda gpu: abs(gpu["bandwidth"] - bandwidth))
    commit = str(content["commit"])[:10] + (" with changes" if content["changed"] else "")
    about = (
        f"predicted: from machine code, for an {nearest['name']} whose copy reaches "
        f"{nearest['bandwidth'] / 1e9:.3g} GB/s, at commit {commit}"
    )
    if content["kernels"] != kernels_digest():
        about += "; predictions are of other kernels: run kernels/predict_kernels.py --bench"
    return Predictions(about, nearest["fractions"])


@cache
def read_predictions() -> dict[str, Any]:
    """The file."""
    return json.loads(PREDICTIONS.read_text(encoding="utf-8"))


@cache
def kernels_digest() -> str:
    """A digest of the sources of ``blip3o_kernels``."""
    spec = importlib.util.find_spec("blip3o_kernels")
    assert spec is not None and spec.submodule_search_locations
    digest = hashlib.sha256()
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]

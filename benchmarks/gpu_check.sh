#!/bin/sh
# All that a machine with a GPU can tell of this checkout: benchmarks/gpu_check.py says how.
# PYTHON in the environment is the Python that has torch.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"

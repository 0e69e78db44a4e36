"""The machine, and what the library would run on it.

    python benchmarks/describe_machine.py [--device cuda] [--json environment.json]

Exits with 1 if torch can use no such device.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from blip3o_fast.atomic import write_json
from blip3o_fast.benchmarking.environment import describe_environment
from blip3o_fast.cli.main import main as blip3o_fast


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what nvidia-smi and ``blip3o-fast doctor`` say; write the environment."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, help="where to write the environment")
    args = parser.parse_args(arguments)
    if args.device == "cuda":
        try:
            subprocess.run(["nvidia-smi"], check=False)
        except OSError as error:
            print(error)
        if not torch.cuda.is_available():
            print("expected a GPU that torch can use, found none; --cpu tests this without one")
            return 1
    environment = describe_environment(torch.device(args.device))
    if args.json is not None:
        write_json(args.json, environment)
    return blip3o_fast(["doctor"])


if __name__ == "__main__":
    sys.exit(main())

"""What ``blip3o-fast doctor`` takes."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``doctor``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")

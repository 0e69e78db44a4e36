"""Evaluate a model on COCO embeddings: the published command, run by ``blip3o-fast evaluate``."""

import sys

from blip3o_fast.cli.main import main

sys.exit(main(["evaluate", *sys.argv[1:]]))

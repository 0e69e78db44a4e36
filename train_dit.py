"""Train on chunked embeddings: the published command, run by ``blip3o-fast train``."""

import sys

from blip3o_fast.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))

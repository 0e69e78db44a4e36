"""``python -m blip3o_fast`` is ``blip3o-fast``."""

import sys

from blip3o_fast.cli.main import main

sys.exit(main())

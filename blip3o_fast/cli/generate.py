"""``blip3o-fast generate``: a folder of EVA shards to a folder of CLIP shards.

One flag for every field of ``TranslationOptions``.
"""

import argparse
import sys

from blip3o_fast.flags import given
from blip3o_fast.options.generate import TranslationOptions
from blip3o_fast.signals import STOPPED
from blip3o_fast.translation import translate_folder


def run(args: argparse.Namespace) -> int:
    """Translate what is not translated yet; 143 when stopped by a signal after saving."""
    options = TranslationOptions(**given(TranslationOptions, args))
    done = translate_folder(options)
    if done.stopped:
        print("blip3o-fast generate: stopped; run again to go on", file=sys.stderr)
        return STOPPED
    if done.is_main:
        print(f"{done.samples} samples in {options.output_dir}, {done.added} of them new here")
    return 0

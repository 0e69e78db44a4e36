"""COCO photos to a report, with the real towers: EVA-CLIP-8B to CLIP ViT-L/14.

    python examples/clip_eva_coco.py --coco ./data/coco --output_dir coco_run

What it downloads, once, into the cache of huggingface_hub (``HF_HOME``):

    BAAI/EVA-CLIP-8B                 about 33 GB, four fp32 files of which the image tower is read
    openai/clip-vit-large-patch14    1.7 GB

What it does not download, and expects below ``--coco``, from https://cocodataset.org/#download:

    val2017/                             5,000 photos, 1 GB
    annotations/captions_val2017.json    out of annotations_trainval2017.zip, 241 MB

What it needs: ``pip install '.[extract,plots]'``; a GPU with about 20 GB for the towers
in fp16, and more for training at this batch size; 13 GB of disk for 5,000 samples of 2.6 MB. On a
machine without a network give local folders as ``--eva_path`` and ``--clip_path``.

Five thousand photos teach the translation's outline; the published model saw 91,000. Stop it at any
moment and run it again: it goes on where it was.
"""

import argparse
import sys
from pathlib import Path

from blip3o_fast.cli.main import main as blip3o_fast


def run(command: str, **options: object) -> None:
    """One command; the script ends with its status if that is not 0."""
    words = [command]
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    print("\n$ blip3o-fast", " ".join(words), flush=True)
    status = blip3o_fast(words)
    if status:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coco", required=True, help="folder of val2017/ and annotations/")
    parser.add_argument("--output_dir", default="coco_run", help="folder for shards, run, report")
    parser.add_argument("--eva_path", help="local folder of EVA-CLIP-8B; None: the hub's")
    parser.add_argument("--clip_path", help="local folder of CLIP; None: the hub's")
    parser.add_argument("--model_size", default="base", help="tiny, small, base or large")
    parser.add_argument("--batch_size", type=int, default=64, help="samples a step")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--max_samples", type=int, help="photos to take; None: all")
    args = parser.parse_args()
    folder = Path(args.output_dir)

    run(
        "extract",
        coco=args.coco,
        eva_path=args.eva_path,
        clip_path=args.clip_path,
        output_dir=folder / "shards",
        max_samples=args.max_samples,
        heldout_fraction=0.1,
    )
    run(
        "train",
        chunked_embeddings_dir=folder / "shards",
        output_dir=folder / "run",
        model_size=args.model_size,
        simple_scale_factor="auto",
        batch_size=args.batch_size,
        max_steps=args.steps,
        eval_every_n_steps=250,
        save_every_n_steps=250,
    )
    run(
        "evaluate",
        model_path=folder / "run",
        embeddings_dir=folder / "shards",
        output_dir=folder / "report",
        batch_size=16,
    )


if __name__ == "__main__":
    main()

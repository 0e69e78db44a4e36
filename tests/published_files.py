"""Pickles in the layouts of the published implementation, at small widths."""

import pickle
from pathlib import Path
from typing import Any

import torch

EVA_WIDTH, CLIP_WIDTH = 12, 8


def towers(samples: int, tokens: int = 256, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``eva`` and ``clip`` as the published extraction has them: fp16 values in fp32."""
    generator = torch.Generator().manual_seed(seed)
    eva, clip = (
        torch.randn(samples, tokens, width, generator=generator).half().float()
        for width in (EVA_WIDTH, CLIP_WIDTH)
    )
    return eva, clip


def shard_content(samples: int = 5, tokens: int = 256, seed: int = 0, **changes: Any) -> dict:
    """A training shard's dict."""
    eva, clip = towers(samples, tokens, seed)
    mode = "cls_patch" if tokens == 257 else "patch_only"
    content = {
        "clip_blip3o_embeddings": clip,
        "eva_blip3o_embeddings": eva,
        "captions": [f"caption {seed}-{i}" for i in range(samples)],
        "keys": [f"{seed:05d}{i:04d}" for i in range(samples)],
        "total_samples": samples,
        "shard_idx": seed,
        "source_tar": f"/data/{seed:05d}.tar",
        "config": {
            "clip_model": "openai/clip-vit-large-patch14",
            "eva_model": "BAAI/EVA-CLIP-8B",
            "clip_dim": CLIP_WIDTH,
            "eva_dim": EVA_WIDTH,
            "tokens": tokens,
            "include_cls": tokens == 257,
            "mode": mode,
            "extraction_method": "custom",
            "format_version": f"blip3o_{tokens}_tokens_chunked_v1",
            "extraction_time": 12.5,
            "cls_first": tokens == 257,
            "patch_order": "16x16_row_major",
        },
    }
    return {k: v for k, v in {**content, **changes}.items() if v is not None}


def coco_content(samples: int = 6, tokens: int = 256, seed: int = 0, **changes: Any) -> dict:
    """A COCO file's dict."""
    eva, clip = towers(samples, tokens, seed)
    content = {
        "clip_embeddings": clip,
        "eva_embeddings": eva,
        "metadata": [
            coco_entry(100 * seed + i, batch=i // 4, sample=i % 4) for i in range(samples)
        ],
        "config": {"format_version": "coco_embeddings_v1", "include_cls": tokens == 257},
    }
    return {k: v for k, v in {**content, **changes}.items() if v is not None}


def coco_entry(image: int, batch: int, sample: int) -> dict:
    """One entry of a COCO file's metadata."""
    return {
        "image_id": image,
        "file_name": f"{image:012d}.jpg",
        "caption": f"about {image}",
        "all_captions": [f"about {image}", "again"],
        "batch_idx": batch,
        "sample_idx": sample,
    }


def write_pickle(path: Path, content: Any, protocol: int = 4) -> Path:
    """Write as the published code does, with ``pickle.dump``."""
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def shard_path(folder: Path, index: int, tokens: int = 256) -> Path:
    """Where the published extraction puts a shard."""
    mode = "cls_patch" if tokens == 257 else "patch_only"
    return folder / f"embeddings_shard_{index:05d}_{mode}.pkl"

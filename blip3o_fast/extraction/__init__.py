"""From images to paired embeddings: towers, image sources, shards."""

from blip3o_fast.extraction.clip import CLIPVisionTower
from blip3o_fast.extraction.encoders import Tower, TowerPair, load_towers
from blip3o_fast.extraction.eva import EVAVisionTower
from blip3o_fast.extraction.features import extract_eva_features, extract_features

__all__ = [
    "CLIPVisionTower",
    "EVAVisionTower",
    "Tower",
    "TowerPair",
    "extract_eva_features",
    "extract_features",
    "load_towers",
]

"""A run of a few milliseconds a step: 6 tokens, width 16, one block."""

import pytest
from small_data import write_shards

from blip3o_fast.training import TrainingOptions

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "eva_adapter_layers": 1,
    "batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "eval_every_n_steps": 3,
    "eval_num_samples": 4,
    "eval_inference_steps": 1,
    "save_every_n_steps": 2,
    "progress": False,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def options(shards, tmp_path):
    """Options of a small run in a new folder, with any of them changed."""

    def make(**changes):
        values = {"chunked_embeddings_dir": shards, "output_dir": tmp_path / "run", **SMALL}
        return TrainingOptions(**{**values, **changes})

    return make

"""Shards and options of a run that takes milliseconds a step."""

import pytest
from small_data import write_shards

from tests.training.runs import small_options


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def options(shards, tmp_path):
    """Options of a small run in a new folder, with any of them changed."""

    def make(**changes):
        folders = {"chunked_embeddings_dir": shards, "output_dir": tmp_path / "run"}
        return small_options(**{**folders, **changes})

    return make

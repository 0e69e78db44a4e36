"""Every function of the library that reads what others wrote is run by a parser of the suite."""

from tests.fuzz.coverage import reached, readers

OTHERS = {
    "benchmarking.predictions.read_predictions": "reads a file of the library",
    "demo.photos._photo_area": "its photos come with the library",
    "extraction.clip.CLIPVisionTower.from_pretrained": "transformers reads the weights",
    "extraction.features._pixels": "the parsers of images run the function that it calls",
    "extraction.views.open_views": "the parsers of images run the function that it calls",
    "installation.install": "reads what pip noted of this installation",
    "ops._cuda.load": "reads what this installation built",
    "ops._cuda.read_choices": "reads a file of the library",
    "training.state.TrainingState.read": "reads what a marker's digests cover",
}
"""Readers that the suite leaves out, and why."""


def test_no_reader_is_left_out(tmp_path):
    found = reached(tmp_path)
    assert [name for name, names in found.items() if not names] == []
    missed = readers() - set().union(*found.values())
    assert missed == {f"blip3o_fast.{name}" for name in OTHERS}

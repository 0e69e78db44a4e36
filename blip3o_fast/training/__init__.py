"""Training: options, the loop, exact resume.

``train(TrainingOptions(...))`` trains or continues the run in its output folder.
"""

from blip3o_fast.options.train import TrainingOptions
from blip3o_fast.training.run import TrainingResult, train
from blip3o_fast.training.trainer import TrainingInterrupted

__all__ = ["TrainingOptions", "TrainingResult", "TrainingInterrupted", "train"]

"""Evaluation: metrics with intervals, two honest baselines, and a report.

``evaluate_model`` does all of this: it fits the baselines on training batches, streams generated
batches through an accumulator for each number of network evaluations, and reports what it found:

    baselines = Baselines.fit(training_batches)
    accumulator = MetricAccumulator(train_mean=baselines.mean.mean)
    accumulator.add(generated, target, keys, sources)          # once per batch
    result = Result(accumulator.finish(), accumulator.scores(), evaluations=1)
    report = Report(title, mean=..., ridge=..., dit=(result, ...), grid=(1, 16, 16))
    print(terminal_table(report)); write_report(report, "out")

``metrics`` defines the numbers, ``baselines`` the methods to compare with, ``report`` the record of
an evaluation.
"""

from blip3o_fast.evaluation.accumulator import MetricAccumulator
from blip3o_fast.evaluation.baselines import (
    Baselines,
    MeanPredictor,
    PairedTokens,
    RidgeRegression,
    TrainingBatch,
)
from blip3o_fast.evaluation.bootstrap import Estimate
from blip3o_fast.evaluation.comparison import terminal_table
from blip3o_fast.evaluation.evaluate import EvaluationSettings, evaluate_model
from blip3o_fast.evaluation.metrics import ClsMetrics, Metrics, SampleScores, token_cosines
from blip3o_fast.evaluation.output import write_report
from blip3o_fast.evaluation.report import Photo, Report, Result, spread_samples, token_map
from blip3o_fast.evaluation.verdict import Verdict
from blip3o_fast.report.style import require_plots

__all__ = [
    "evaluate_model",
    "EvaluationSettings",
    "MetricAccumulator",
    "Metrics",
    "ClsMetrics",
    "SampleScores",
    "Estimate",
    "token_cosines",
    "PairedTokens",
    "TrainingBatch",
    "Baselines",
    "MeanPredictor",
    "RidgeRegression",
    "Result",
    "Photo",
    "Report",
    "Verdict",
    "token_map",
    "spread_samples",
    "terminal_table",
    "require_plots",
    "write_report",
]

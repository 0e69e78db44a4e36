import dataclasses

import pytest

from blip3o_fast.evaluation import Estimate, terminal_table
from blip3o_fast.evaluation.comparison import comparison_rows, metric_cells, with_interval
from blip3o_fast.evaluation.report_page import render_page


def test_rows_are_baselines_every_count_and_best(report):
    rows = comparison_rows(report)
    counts = [f"DiT, {n} eval{'s' * (n > 1)}" for n in (1, 2, 3, 10, 100)]
    assert [row.method for row in rows] == ["mean predictor", "ridge", *counts, "DiT, best (1)"]
    assert [row.is_best for row in rows] == [False] * 7 + [True]


def test_fitted_solvers_and_regression_have_rows_of_their_own(report):
    fitted = tuple(dataclasses.replace(report.dit[2], evaluations=n) for n in (3, 5))
    more = dataclasses.replace(report, fitted=fitted, regression=report.dit[0])
    methods = [row.method for row in comparison_rows(more)]
    assert methods[2] == "regression"
    assert methods[-3:] == ["fitted (3)", "fitted (5)", "DiT, best (1)"]
    lines = terminal_table(more).splitlines()
    assert max(map(len, lines)) <= 80
    rules = [i for i, line in enumerate(lines) if set(line) == {"-"}]
    assert rules[:2] == [1, 5], "baselines stand between the first two rules"
    text = " ".join(terminal_table(more).split())
    assert "regression: the same network" in text and "fitted (n): the DiT with a solver" in text


def test_of_many_counts_the_usual_are_shown(report):
    last = report.dit[-1]
    more = [dataclasses.replace(last, evaluations=n) for n in (101, 102, 103, 104)]
    many = dataclasses.replace(report, dit=(*report.dit, *more))
    methods = [row.method for row in comparison_rows(many)][2:]
    counts = [f"DiT, {n} eval{'s' * (n > 1)}" for n in (1, 2, 10, 100)]
    assert methods == [*counts, "DiT, best (1)"]


def test_cells_are_the_metrics(report):
    metrics = report.ridge.metrics
    token = metrics.token_cosine
    assert metric_cells(metrics) == (
        f"{token.value:.3f} [{token.low:.3f},{token.high:.3f}]",
        f"{metrics.image_cosine.value:.3f}",
        f"{metrics.centred_cosine.value:.3f}",
        f"{metrics.mse.value:.3f}",
        f"{metrics.r2.value:.3f}",
        f"{metrics.recall_generated_to_target[1].value:.3f}",
        f"{metrics.cka:.3f}",
    )


def test_a_single_sample_is_compared_with_nothing(report):
    def lone(result):
        metrics = dataclasses.replace(
            result.metrics,
            **{"samples": 1, "sources": 1, "cka": None, "energy_distance": None},
            **{"recall_generated_to_target": {}, "recall_target_to_generated": {}},
        )
        return dataclasses.replace(result, metrics=metrics)

    one = dataclasses.replace(
        report, mean=lone(report.mean), ridge=lone(report.ridge), dit=tuple(map(lone, report.dit))
    )
    assert metric_cells(one.ridge.metrics)[-2:] == ("none", "none")
    said = " ".join(terminal_table(one).split())
    assert "1 held-out sample of 1 photo, from which no interval follows." in said
    assert "R@1 and CKA compare samples, and there is one." in said and "chance" not in said
    page = render_page(one, {}, {})
    assert "R@1" in page and "R@5" not in page


@pytest.mark.parametrize(
    ("mse", "text"), [(0.4, "0.400"), (12.34, "12.3"), (123.4, "123"), (1.5e-5, "1.50e-05")]
)
def test_mse_keeps_three_digits(report, mse, text):
    metrics = dataclasses.replace(report.ridge.metrics, mse=Estimate(mse))
    assert metric_cells(metrics)[3] == text


def test_intervals():
    assert with_interval(Estimate(0.5, 0.25, 0.75), 2) == "0.50 [0.25,0.75]"
    assert with_interval(Estimate(0.5)) == "0.500"


def test_terminal_table_is_aligned_and_fits_a_terminal(report):
    lines = terminal_table(report).splitlines()
    rows = comparison_rows(report)
    assert max(map(len, lines)) <= 80
    assert lines[0].split()[:3] == ["method", "token", "cosine"]
    ends = {line.rindex(row.cells[-1]) + len(row.cells[-1]) for row, line in _pairs(rows, lines)}
    assert ends == {len(lines[0])}
    for row, line in _pairs(rows, lines):
        assert all(cell in line for cell in row.cells)
    assert terminal_table(report).isascii()


def _pairs(rows, lines):
    found = [(row, [line for line in lines if line.startswith(row.method + " ")]) for row in rows]
    assert all(len(matches) == 1 for _, matches in found)
    return [(row, matches[0]) for row, matches in found]


@pytest.mark.parametrize(
    ("noise", "sentence"),
    [(0.3, "The DiT beats ridge regression:"), (0.9, "The DiT does not beat ridge regression:")],
)
def test_the_table_says_who_wins(make_report, noise, sentence):
    table = terminal_table(make_report(best_noise=noise))
    assert sentence in table
    assert "24 held-out samples of 8 photos" in " ".join(table.split())
    assert "(chance 0.042)" in " ".join(table.split())

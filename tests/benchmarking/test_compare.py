"""The noise band, and what a comparison reports."""

import pytest
from benchmarking.records import measurement, record

from blip3o_fast.benchmarking.compare import check_device, compare, noise_band
from blip3o_fast.benchmarking.record_text import render_comparison


def against(old, new, **options):
    return compare(record(old, **options), record(new, **options))


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(1.04, "same"), (1.06, "slower"), (0.96, "same"), (0.94, "faster")]
)
def test_a_gpu_is_steady_within_five_percent(seconds, verdict):
    (change,) = against(measurement(seconds=1.0), measurement(seconds=seconds)).changes
    assert change.band == 0.05
    assert change.ratio == pytest.approx(seconds)
    assert change.verdict == verdict
    assert change.is_regression == (verdict == "slower")


@pytest.mark.parametrize(("seconds", "verdict"), [(1.14, "same"), (1.16, "slower")])
def test_a_cpu_is_shared(seconds, verdict):
    (change,) = against(measurement(seconds=1.0), measurement(seconds=seconds), kind="cpu").changes
    assert (change.band, change.verdict) == (0.15, verdict)


def test_the_band_is_twice_the_larger_spread():
    quiet, noisy = measurement(spread=0.01), measurement(spread=0.2)
    assert noise_band(quiet, noisy, 0.05) == pytest.approx(0.4)
    assert noise_band(noisy, quiet, 0.05) == pytest.approx(0.4)
    assert noise_band(quiet, quiet, 0.05) == 0.05


def test_noise_is_not_a_regression():
    found = against(measurement(seconds=1.0, spread=0.2), measurement(seconds=1.3, spread=0.2))
    assert not found.regressions
    assert "1 of 1 figures unchanged within noise; 0 regressions" in render_comparison(found)


def test_a_slower_peer_is_not_our_regression():
    old, new = (measurement("published", s, ours=False) for s in (1.0, 2.0))
    found = against(old, new)
    assert found.changes[0].verdict == "slower"
    assert not found.regressions
    assert "REGRESSION" not in render_comparison(found)


def test_a_regression_is_shown_with_its_band():
    text = render_comparison(against(measurement(seconds=1.0), measurement(seconds=2.0)))
    assert "evaluation, evaluation, base-b1, bf16, plan" in text
    for part in ("1 s", "2 s", "+100%", "band 5%", "REGRESSION", "; 1 regressions; 0 new, 0 gone"):
        assert part in text


def test_new_and_gone_are_listed():
    kept, gone, new = (measurement(name) for name in ("plan", "old way", "new way"))
    found = compare(record(kept, gone), record(kept, new))
    assert found.gone == ("evaluation, evaluation, base-b1, bf16, old way",)
    assert found.added == ("evaluation, evaluation, base-b1, bf16, new way",)
    text = render_comparison(found)
    assert f"only in this run: {found.added[0]}" in text
    assert f"only in the earlier run: {found.gone[0]}" in text
    assert "1 new, 1 gone" in text


def test_groups_that_were_not_asked_for_are_not_gone():
    kept, other = measurement(), measurement("trainer", group="training")
    assert compare(record(kept, other), record(kept)).gone == ()


def test_different_devices_do_not_compare():
    old = record(measurement(), device="H100")
    message = "expected a record of this device, H200, got one of H100"
    with pytest.raises(ValueError, match=message):
        compare(old, record(measurement(), device="H200"))
    check_device(old, "H100")


def test_nothing_in_common():
    with pytest.raises(ValueError, match="expected measurements in common, found none"):
        against(measurement("a"), measurement("b"))


def test_a_device_that_changed_itself_is_a_warning():
    old, new = record(measurement()), record(measurement(), bandwidth=1.5e12)
    (warning,) = compare(old, new).warnings
    assert warning == "the copy bandwidth of the device itself changed by -50%"
    assert f"warning: {warning}" in render_comparison(compare(old, new))
    (warning,) = compare(old, record(measurement(), rates={"bf16": 900e12, "fp32": 1.0})).warnings
    assert warning == "the GEMM rate in bf16 of the device itself changed by +12%"

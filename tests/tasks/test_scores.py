"""Accuracy judges generated answers: worked examples, published intervals, aligned tables."""

import math

import pytest

from tasks.scores import (
    Prediction,
    calibrate,
    columns,
    describe,
    fields,
    summarize,
    table,
    wilson_interval,
)


def test_summary_of_a_worked_example() -> None:
    truth = [1, 1, 1, 0, 0, 0, 0]
    generated = [1, 0, -1, 0, 0, 1, -1]
    likelier = [1, 1, 1, 0, 0, 0, 1]
    predictions = [
        Prediction("", label, [-1.0, -2.0] if best == 0 else [-2.0, -1.0])
        for label, best in zip(generated, likelier, strict=True)
    ]
    summary = summarize(truth, predictions, ("negative", "positive"))
    low, high = summary.pop("interval_95")
    assert (low, high) == pytest.approx((0.158219, 0.749542), abs=1e-6)
    assert summary == {
        "accuracy": 3 / 7, "n": 7, "negative": 3, "positive": 2, "garbage": 2,
        "confusion": {
            "negative": {"negative": 2, "positive": 1, "garbage": 1},
            "positive": {"negative": 1, "positive": 1, "garbage": 1},
        },
        "constrained_accuracy": 6 / 7,
    }


def test_calibration_divides_by_the_odds_of_texts_without_content() -> None:
    def said(*odds: float) -> Prediction:
        return Prediction("x", -1, [math.log(p) for p in odds])

    # The bias is (0.6 + 0.3) to (0.3 + 0.1): the first label needs 2.25 times the odds.
    found = calibrate([said(0.8, 0.1), said(0.6, 0.3), said(0.6, 0.3), said(0.3, 0.1)], 2)
    assert [prediction.calibrated for prediction in found] == [0, 1]
    assert [prediction.label_logprobs for prediction in found] == [
        said(0.8, 0.1).label_logprobs, said(0.6, 0.3).label_logprobs]
    results = summarize([0, 1], found, ("no", "yes"))
    assert (results["constrained_accuracy"], results["calibrated_accuracy"]) == (0.5, 1.0)
    assert results["accuracy"] == 0  # the generated answers are a figure of their own
    assert describe(results).endswith("constrained accuracy 0.5000, calibrated 1.0000")
    assert "calibrated_accuracy" not in summarize([0], [said(0.8, 0.1)], ("no", "yes"))


def test_calibration_survives_labels_that_are_next_to_impossible() -> None:
    predictions = [Prediction("x", 0, [-2000.0, -1990.0]), Prediction("", 0, [-1000.0, -3000.0])]
    assert calibrate(predictions, 1)[0].calibrated == 1


def test_fields_with_their_default_are_not_written() -> None:
    plain = Prediction("x", 0, [-1.0])
    assert fields(plain) == {"generated": "x", "label": 0, "label_logprobs": [-1.0]}
    assert fields(plain._replace(reasoning="r", calibrated=0)) == {
        **fields(plain), "reasoning": "r", "calibrated": 0}


def test_all_garbage_is_all_wrong() -> None:
    summary = summarize([0, 1], [Prediction("?", -1, [-1.0, -2.0])] * 2, ("negative", "positive"))
    assert (summary["accuracy"], summary["garbage"], summary["constrained_accuracy"]) == (0, 2, 0.5)


@pytest.mark.parametrize(  # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
     (1, 29, 0.0061, 0.1718)],
)
def test_interval_equals_published_ones(right: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(n - right, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_interval_stays_between_0_and_1_around_the_share() -> None:
    for n in (*range(1, 40), 1066):
        for right in range(n + 1):
            low, high = wilson_interval(right, n)
            assert 0 <= low < high <= 1
            assert low - 1e-9 <= right / n <= high + 1e-9
            assert (low < 1e-9, high > 1 - 1e-9) == (right == 0, right == n)


# --- answers ---------------------------------------------------------------------------------


def test_table_and_line_show_the_same_numbers() -> None:
    predictions = [Prediction("x", label, [-1.0, -2.0]) for label in (0, 1, -1, 0)]
    results = summarize([0, 1, 1, 1], predictions, ("no", "yes"))
    assert describe(results) == (
        "accuracy 0.5000 (95 % interval 0.150 to 0.850, n=4): 2 no, 1 yes, 1 garbage; "
        "constrained accuracy 0.2500"
    )
    rows = [{"checkpoint": name} | columns(results) for name in ("best", "a longer name")]
    assert table(rows) == (
        "   checkpoint  test accuracy   95 % interval  no  yes  garbage  constrained\n"
        "         best         0.5000  0.150 to 0.850   2    1        1       0.2500\n"
        "a longer name         0.5000  0.150 to 0.850   2    1        1       0.2500"
    )

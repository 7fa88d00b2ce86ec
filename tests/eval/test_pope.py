import pytest

from edgekit.errors import UsageError
from edgekit.eval.pope import pope, verdict


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes, there is a dog.", "yes"),
        ("yes", "yes"),
        ("No.", "no"),
        ("There isn't one.", "no"),
        ("There isn\u2019t one.", "no"),
        ("Yes, but not a dog.", "no"),
        ("I do not see it", "no"),
        ("A dog.", "invalid"),
        ("Nothing to eat, yesterday", "invalid"),
        ("", "invalid"),
    ],
)
def test_verdicts(answer: str, expected: str) -> None:
    assert verdict(answer) == expected


def test_figures_by_hand() -> None:
    found = pope(
        [("yes", True), ("yes", True), ("no", True), ("yes", False), ("no", False), ("hm", False)]
    )
    assert found.questions == 6
    assert found.accuracy == pytest.approx(3 / 6)  # the invalid one is wrong, not left out
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 / 3)
    assert found.yes_ratio == pytest.approx(3 / 6)
    assert found.invalid == 1
    assert found.interval[0] < 0.5 < found.interval[1]


def test_a_model_that_always_agrees() -> None:
    found = pope([("yes", True), ("yes", False)] * 10)
    assert (found.accuracy, found.recall, found.yes_ratio) == (0.5, 1.0, 1.0)


def test_a_model_that_says_nothing() -> None:
    found = pope([("", True), ("", False)])
    assert (found.accuracy, found.precision, found.f1, found.invalid) == (0.0, 0.0, 0.0, 2)
    with pytest.raises(UsageError, match="no answer"):
        pope([])

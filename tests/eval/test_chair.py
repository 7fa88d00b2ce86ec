from pathlib import Path

import pytest

from edgekit.errors import UsageError
from edgekit.eval.chair import captioned, chair
from edgekit.eval.objects import Vocabulary, read_vocabulary

LINES = "# animals\ndog, puppy, hot-dog stand\nmouse, mice\n\nhot dog\nknife\ndining table, table\n"


@pytest.fixture
def vocabulary(tmp_path: Path) -> Vocabulary:
    file = tmp_path / "objects.txt"
    file.write_text(LINES)
    return read_vocabulary(file)


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("A Puppy, and two DOGS!", ["dog", "dog"]),
        ("hot dogs on dining tables", ["hot dog", "dining table"]),
        ("a hot, dog-tired mouse", ["mouse"]),
        ("mice with knives on a table", ["mouse", "knife", "dining table"]),
        ("the hot-dog stand", ["dog"]),
        ("nothing here", []),
        ("", []),
    ],
)
def test_mentions(vocabulary: Vocabulary, text: str, objects: list[str]) -> None:
    assert vocabulary.mentions(text) == objects


def test_figures_by_hand(vocabulary: Vocabulary) -> None:
    read = [
        captioned("A dog and a dog by a mouse.", ["puppy", "table"], vocabulary),
        captioned("A table.", ["dining table"], vocabulary),
        captioned("Nothing.", ["knife"], vocabulary),
    ]
    found = chair(read)
    assert found.c_i == pytest.approx(1 / 4)  # the mouse, among four mentions
    assert found.c_s == pytest.approx(1 / 3)
    assert found.recall == pytest.approx(2 / 4)
    assert found.precision == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))
    assert found.objects == pytest.approx((2 + 1 + 0) / 3)
    assert found.words == pytest.approx((8 + 2 + 1) / 3)


def test_intervals_hold_the_figure_and_shrink(vocabulary: Vocabulary) -> None:
    read = [captioned("A dog.", ["dog"] if i % 4 else ["mouse"], vocabulary) for i in range(400)]
    few, many = chair(read[:40]), chair(read)
    for found in (few, many):
        assert found.c_i == found.c_s == pytest.approx(0.25)
        assert found.c_i_interval[0] < 0.25 < found.c_i_interval[1]
    width = [found.c_i_interval[1] - found.c_i_interval[0] for found in (few, many)]
    assert 2 < width[0] / width[1] < 5  # near the square root of ten
    # Of one mention per caption, C_I is C_S, and the bootstrap says what Wilson's interval says.
    assert many.c_i_interval == pytest.approx(many.c_s_interval, abs=0.02)


def test_a_silent_model_invents_nothing_and_finds_nothing(vocabulary: Vocabulary) -> None:
    found = chair([captioned("", ["dog"], vocabulary)] * 3)
    assert (found.c_i, found.c_s, found.recall, found.f1, found.words) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "no object in it"),
        ("# nothing\n\n", "no object in it"),
        ("dog, cat\ncat\n", "line 2: 'cat' means 'dog' and 'cat'"),
        ("dog, ...\n", "line 1: '...' has no word"),
    ],
    ids=["empty", "comments", "twice", "wordless"],
)
def test_bad_vocabularies(lines: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "objects.txt"
    file.write_text(lines)
    with pytest.raises(UsageError, match=message):
        read_vocabulary(file)


def test_truth_must_be_in_the_vocabulary(vocabulary: Vocabulary) -> None:
    with pytest.raises(UsageError, match="'whale' is not in the vocabulary"):
        captioned("A whale.", ["whale"], vocabulary)
    with pytest.raises(UsageError, match="no caption given"):
        chair([])

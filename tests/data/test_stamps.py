"""Composed pictures, out of a small archive of the expected form."""

import json
from pathlib import Path

import numpy as np
import pytest

from edgekit.data.archives import CorpusError
from edgekit.data.stamp_objects import SYNONYMS, THEMES
from edgekit.data.stamp_scenes import (
    LIKELY,
    SIDE,
    SURPRISING,
    StampBook,
    caption,
    compose,
    draw_scene,
)
from edgekit.data.stamps import PARTS, build_stamps, main
from edgekit.errors import UsageError
from edgekit.eval.objects import read_vocabulary
from edgekit.eval.pictures import read_pictures
from edgekit.testing_stamps import write_stamp_archive

SMALL = {"validation": 15, "test": 25}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stamps")
    write_stamp_archive(folder / "archives")
    build_stamps(folder / "out", folder / "archives", SMALL)
    return folder


def test_pictures_are_annotated_in_the_vocabulary(made: Path) -> None:
    vocabulary = read_vocabulary(made / "out" / "vocabulary.txt")
    assert vocabulary.names == [name for names in THEMES.values() for name in names]
    assert len(vocabulary.names) == 40
    assert vocabulary.mentions("A hot air balloon above palm trees.") == ["balloon", "palm"]
    images = set()
    for part, count in SMALL.items():
        pictures = read_pictures(made / "out" / part / "pictures.jsonl")
        assert len(pictures) == count
        assert all(vocabulary.mentions(" ".join(p.objects)) == [*p.objects] for p in pictures)
        images |= {p.image.read_bytes() for p in pictures}
    assert len(images) == sum(SMALL.values())  # no scene is in both parts


def test_the_same_archive_gives_the_same_pictures(made: Path, tmp_path: Path) -> None:
    assert main(["-o", str(tmp_path / "out"), "--from", str(made / "archives")]) == 0
    files = sorted(path for path in (made / "out").rglob("*") if path.is_file())
    for path in files:
        again = (tmp_path / "out" / path.relative_to(made / "out")).read_bytes()
        if path.name == "pictures.jsonl":
            again = b"".join(again.splitlines(keepends=True)[: SMALL[path.parent.name]])
        assert path.name == "SOURCES.json" or again == path.read_bytes()
    sources = json.loads((tmp_path / "out" / "SOURCES.json").read_text(encoding="utf-8"))
    assert sources["counts"] == {"stamps": 58, **PARTS}
    assert sources["archives"]["tuxpaint-stamps-default"]["licence"].startswith("GPL-2")


def test_what_is_missing_is_said_in_a_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="exists already"):
        build_stamps(made / "out", made / "archives")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="apt-get download tuxpaint-stamps-default"):
        build_stamps(tmp_path / "out", tmp_path / "empty")
    write_stamp_archive(tmp_path / "short", without=("household/key",))
    with pytest.raises(CorpusError, match=r"holds no .*/household/key\.png; fetch it anew"):
        build_stamps(tmp_path / "out", tmp_path / "short")
    assert main(["-o", str(tmp_path / "out"), "--from", str(tmp_path / "short")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"make them with python -m edgekit\.data\.stamps"):
        StampBook.read(tmp_path)


def test_scenes_have_a_theme_and_hide_some_objects() -> None:
    rng = np.random.default_rng(1)
    scenes = [draw_scene(rng, THEMES, LIKELY) for _ in range(2000)]
    assert all(1 <= len(s.mentioned) <= 6 and set(s.drawn) <= set(s.mentioned) for s in scenes)
    mentioned = sum(len(s.mentioned) for s in scenes)
    assert sum(len(s.drawn) for s in scenes) / mentioned == pytest.approx(0.6, abs=0.02)
    surprising = [draw_scene(rng, THEMES, SURPRISING) for _ in range(2000)]
    assert all(s.drawn == s.mentioned for s in surprising)

    def shared(objects: tuple[str, ...]) -> int:
        return max(sum(name in names for name in objects) for names in THEMES.values())

    shares = [
        sum(shared(s.mentioned) for s in found) / sum(len(s.mentioned) for s in found)
        for found in (scenes, surprising)
    ]
    assert shares[0] > 0.8 > 0.7 > shares[1]


def test_captions_begin_with_the_theme() -> None:
    assert caption(("apple",), THEMES) == "There is an apple."
    told = caption(("dog", "orange", "pizza"), THEMES)
    assert told == "There is an orange, a pizza and a dog."
    assert not set(SYNONYMS) - {name for names in THEMES.values() for name in names}


def test_pictures_show_what_is_drawn(made: Path) -> None:
    book = StampBook.read(made / "out")
    empty, again, shown = (
        np.asarray(compose(np.random.default_rng(2), book, drawn), dtype=int)
        for drawn in ((), (), ("dog", "teapot"))
    )
    assert empty.shape == (SIDE, SIDE, 3)
    assert np.array_equal(empty, again)
    changed = (empty != shown).any(axis=2)
    colours = {tuple(c) for c in shown[changed].tolist()}
    assert 300 < changed.sum() < 2 * 36 * 36
    for name in ("dog", "teapot"):
        stamp = np.asarray(book.stamps[name][0])
        middle = stamp[stamp.shape[0] // 2, stamp.shape[1] // 2, :3]
        assert tuple(middle.tolist()) in colours

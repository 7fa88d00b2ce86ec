import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from edgekit.errors import SourceError, UsageError
from edgekit.sources import open_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The Hub's cache with one model in it, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "models--someone--tiny-llama"
    shutil.copytree(tiny_checkpoint("llama"), model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_a_cached_model_opens_offline(hub_cache: Path) -> None:
    source = open_source("someone/tiny-llama")
    assert source.name == "tiny-llama"
    assert source.identity["kind"] == "hub"
    assert source.identity["name"] == "someone/tiny-llama"
    assert source.identity["revision"] == COMMIT
    assert len(source.identity["sha256"]) == 64


def test_a_revision_may_be_given(hub_cache: Path) -> None:
    assert open_source("someone/tiny-llama", revision=COMMIT).identity["revision"] == COMMIT
    with pytest.raises(
        SourceError, match="at revision 'other': neither a path here nor in the Hub"
    ):
        open_source("someone/tiny-llama", revision="other")


def test_a_model_that_is_not_cached_says_how_to_get_it(hub_cache: Path) -> None:
    with pytest.raises(SourceError, match=r"neither a path here nor in the Hub cache.*offline"):
        open_source("someone/other-model")


def test_a_repository_without_safetensors_is_refused(hub_cache: Path) -> None:
    """Its pickles are never fetched, so they are not seen here either."""
    snapshot = hub_cache / "models--someone--tiny-llama" / "snapshots" / COMMIT
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"tiny-llama: no safetensors in its Hub repository.*bin"):
        open_source("someone/tiny-llama")


@pytest.mark.parametrize("spec", ["no-such-model", "a/b/c", "./someone/tiny", "", "some one/x"])
def test_what_is_no_hub_id_is_not_asked_for(hub_cache: Path, spec: str) -> None:
    with pytest.raises(SourceError, match="no such source; allowed"):
        open_source(spec)


def test_a_revision_of_something_else_is_refused(hub_cache: Path) -> None:
    with pytest.raises(UsageError, match="with a Hub id only"):
        open_source(hub_cache, revision="main")

import pytest

from edgekit.errors import UsageError
from edgekit.spin import SpinConfig, preset, preset_names


@pytest.mark.parametrize(
    ("keep", "heads", "kept"),
    [(0.95, 32, 30), (0.80, 32, 25), (0.82, 32, 26), (0.70, 32, 22), (0.90, 40, 36), (1.0, 9, 9)],
)
def test_keep_is_cut_as_the_authors_cut_it(keep: float, heads: int, kept: int) -> None:
    assert SpinConfig(keep=keep).kept(heads) == kept


def test_suppress_counts_heads() -> None:
    assert SpinConfig(suppress=2).kept(9) == 7
    assert SpinConfig(suppress=0).kept(9) == 9


def test_layers() -> None:
    assert SpinConfig(suppress=1).chosen(4) == range(4)
    assert SpinConfig(suppress=1, layers=(1, 3)).chosen(4) == range(1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({}, "give suppress .* or keep", id="neither"),
        pytest.param({"suppress": 1, "keep": 0.5}, "one of them", id="both"),
        pytest.param({"suppress": -1}, "0 or more", id="suppress"),
        pytest.param({"keep": 0.0}, "above 0", id="keep"),
        pytest.param({"suppress": 1, "alpha": 1.5}, "0 to 1", id="alpha"),
        pytest.param({"suppress": 1, "layers": (3, 3)}, "one after the last", id="layers"),
        pytest.param({"suppress": 1, "image_token_ids": ()}, "one or more", id="tokens"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SpinConfig(**options)


def test_too_many_heads_or_layers() -> None:
    with pytest.raises(UsageError, match="suppress 4 given for 4 heads"):
        SpinConfig(suppress=4).kept(4)
    with pytest.raises(UsageError, match=r"keep 0\.2 given for 4 heads"):
        SpinConfig(keep=0.2).kept(4)
    with pytest.raises(UsageError, match="layers 0 to 5 given; allowed: up to 4"):
        SpinConfig(suppress=1, layers=(0, 5)).chosen(4)


def test_presets_load() -> None:
    assert preset("llava-1_5-7b-chair").kept(32) == 30
    assert preset("qwen-vl-chat") == SpinConfig(
        keep=0.7, alpha=0.08, layers=(0, 20), score="logit", queries="last"
    )
    for name in preset_names():
        assert preset(name, score="mass").score == "mass"
    assert preset("llava-1_5-7b-pope", suppress=3).kept(32) == 29


def test_unknown_preset() -> None:
    with pytest.raises(UsageError, match="preset 'llava' is unknown; known: llava-1_5"):
        preset("llava")

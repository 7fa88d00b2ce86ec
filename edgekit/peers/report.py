"""What is measured of a peer."""

from dataclasses import dataclass
from typing import Literal

from edgekit.runtime.latency import Prefill, Steps

__all__ = ["Missing", "PeerReport", "Setup"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """A row that the peer could not do: reading a prompt of, or decoding after, `tokens` tokens."""

    row: Literal["prompt", "depth"]
    tokens: int
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """How a peer was set up.

    Attributes:
        threads: as set; None: the engine's choice.
        context: tokens that it can hold; None: no limit known.
        trained_context: tokens that the model was trained on; beyond them the speed still means
            something, the text does not. None where the peer does not tell.
        settings: what was set besides.
    """

    threads: int | None
    context: int | None
    trained_context: int | None
    settings: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerReport:
    """Everything measured of one peer.

    Attributes:
        model: the name of its file or directory.
        model_bytes: of graph and weights on disk.
        load_ms: from the imported package to a model ready to run.
        setup: None, as `load_ms` is, if its process was killed before it could tell.
        missing: rows that the peer could not do, with the reason.
        peak_rss: of its process, in bytes, a mapped model file included; None where `/proc` does
            not tell, or the process was killed.
    """

    peer: str
    model: str
    model_bytes: int
    repeat: int
    versions: dict[str, str]
    load_ms: float | None = None
    setup: Setup | None = None
    prefill: tuple[Prefill, ...] = ()
    decode: tuple[Steps, ...] = ()
    missing: tuple[Missing, ...] = ()
    peak_rss: int | None = None

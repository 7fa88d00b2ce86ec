"""What a user would pick instead, measured as `edgekit profile` measures a bundle.

Each peer runs in a process of its own, with the same threads, the same text cut to the same count
of tokens, and greedy steps one at a time. A peer is a module here whose file is called as the peer.

Example:
    >>> from edgekit.peers import measure_peer
    >>> from edgekit.runtime.workload import Options
    >>> options = Options(prompts=(128,), depths=(0, 512), threads=1)
    >>> report = measure_peer("llama-cpp", "smollm2.Q4_1.gguf", options)         # doctest: +SKIP
    >>> [row.depth for row in report.decode], report.missing                     # doctest: +SKIP
    ([0, 512], ())
"""

from edgekit.peers.measuring import measure_peer
from edgekit.peers.models import default_model
from edgekit.peers.registry import PEERS, check_installed
from edgekit.peers.report import Missing, PeerReport

__all__ = [
    "PEERS",
    "Missing",
    "PeerReport",
    "check_installed",
    "default_model",
    "measure_peer",
]

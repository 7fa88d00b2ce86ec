"""Which model a peer is measured on when the user names none."""

from pathlib import Path

from edgekit.bundle import Manifest, read_manifest
from edgekit.errors import UsageError
from edgekit.peers.registry import PEERS

__all__ = ["default_model"]


def default_model(name: str, bundle: str | Path) -> Path:
    """The model to measure the peer `name` on, beside `bundle`.

    llama.cpp reads the GGUF file that the bundle was made from, where that is a built-in model. The
    others read the bundle itself, if all its layers are softmax: a stock export has no others.

    Args:
        name: one of `PEERS`.
        bundle: the bundle's directory.

    Raises:
        BundleError: if it is not a sound bundle.
        SourceError: if the package with the built-in model is not installed.
        UsageError: if there is no such model, and the user has to name one.
    """
    manifest = read_manifest(bundle)
    if PEERS[name].marker is None:
        return _gguf(name, manifest)
    stock = set(manifest.mixers) == {"softmax"} and manifest.vision is None
    if not stock or not (Path(bundle) / str(PEERS[name].marker)).is_file():
        raise _unnamed(name, f"{bundle} is not what it reads")
    return Path(bundle)


def _gguf(name: str, manifest: Manifest) -> Path:
    # Late: it reaches torch, which measuring a bundle does without.
    from edgekit.sources.builtin import BUILT_IN, locate_built_in

    made_from = manifest.source.get("name")
    keys = [key for key, model in BUILT_IN.items() if model.name == made_from]
    if manifest.source.get("kind") != "built-in" or not keys:
        raise _unnamed(name, f"the bundle was made from {made_from}, not from a built-in model")
    return locate_built_in(keys[0])


def _unnamed(name: str, reason: str) -> UsageError:
    return UsageError(f"peer {name}: {reason}; name the model of the peer: {PEERS[name].reads}")

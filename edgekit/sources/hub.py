"""A model of the Hugging Face Hub, through huggingface_hub's cache; respects HF_HUB_OFFLINE."""

from pathlib import Path

from edgekit.errors import SourceError
from edgekit.sources.base import Source
from edgekit.sources.hf import open_directory

__all__ = ["open_hub"]

# Never *.bin: those are pickles. The last two are vocabularies without a tokenizer.json.
PATTERNS = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "merges.txt"]
DUPLICATES = ["consolidated*", "original/*"]  # the same weights in the vendor's own layout


def open_hub(model_id: str, *, revision: str | None = None) -> Source:
    """Download (or find in the cache) a Hub model and open it.

    Args:
        model_id: owner/name.
        revision: branch, tag or commit; None: the default branch.

    Raises:
        SourceError: if it cannot be had: no such model, no access, no network and not cached; or
            it has no safetensors.
        UnsupportedError: if it is not of a supported family.
    """
    directory = _snapshot(model_id, revision)
    if not any(directory.glob("*.safetensors")):
        raise SourceError(
            f"{model_id}: no safetensors in its Hub repository (or its cached part, offline); "
            "a .bin is a pickle, which can run code and is not fetched: "
            "choose a model or a revision with safetensors"
        )
    # The cache names a snapshot by its commit.
    identity = {"kind": "hub", "name": model_id, "revision": directory.name}
    return open_directory(directory, name=model_id.rpartition("/")[2], identity=identity)


def _snapshot(model_id: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    wanted = model_id if revision is None else f"{model_id} at revision {revision!r}"
    try:
        return Path(
            snapshot_download(
                model_id, revision=revision, allow_patterns=PATTERNS, ignore_patterns=DUPLICATES
            )
        )
    except errors.GatedRepoError as cause:
        raise SourceError(
            f"{wanted}: access is gated; accept its terms on the Hub, then run `hf auth login`"
        ) from cause
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as cause:
        raise SourceError(
            f"{wanted}: neither a path here nor a model that the Hub shows you; check the spelling"
        ) from cause
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as cause:
        raise SourceError(
            f"{wanted}: neither a path here nor in the Hub cache, and the Hub cannot be asked "
            "(offline, or HF_HUB_OFFLINE is set); fetch it with `hf download` while online"
        ) from cause
    except (OSError, errors.HFValidationError) as cause:
        reason = str(cause).partition("\n")[0]
        raise SourceError(
            f"{wanted}: cannot be fetched from the Hub ({reason}); try again"
        ) from cause

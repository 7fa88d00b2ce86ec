"""Data sets of the Hugging Face `datasets` library: on the hub, or in a local directory."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgekit.data.documents import DATASETS, Origin, parsed
from edgekit.errors import UsageError

__all__ = ["read_dataset"]

SPLIT = re.compile(r":(\w+(?:\[[^\]]*\])?)$")  # such as `:test` or `:train[:1000]`
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves


def read_dataset(spec: str) -> Origin:
    """The rows of a data set, from its column `messages` or `text`.

    Args:
        spec: `datasets:ID[:SPLIT]`, by default the split `train`. ID is a name on the hub, a
            directory of data files, or one that `save_to_disk` made.

    Raises:
        UsageError: if it cannot be loaded, lacks the split or both columns, or a row is malformed.
    """
    rows = _rows(*_name_and_split(spec), spec)
    digest = hashlib.sha256()
    documents = []
    for number, row in enumerate(rows):
        record = {key: row[key] for key in ("messages", "text") if row.get(key) is not None}
        digest.update(json.dumps(record, sort_keys=True).encode())
        documents.append(parsed(record, f"{spec}: row {number}"))
    kept = tuple(document for document in documents if document.messages or document.text.strip())
    if not kept:
        raise UsageError(f"{spec}: holds no text; leave it out")
    return Origin(name=spec, sha256=digest.hexdigest(), documents=kept)


def _name_and_split(spec: str) -> tuple[str, str]:
    text = spec.removeprefix(DATASETS)
    found = SPLIT.search(text)
    return (text[: found.start()], found[1]) if found else (text, "train")


def _rows(name: str, split: str, spec: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as cause:
        raise UsageError(f"{spec}: needs the package datasets; pip install datasets") from cause
    directory = Path(name)
    try:
        if any((directory / file).is_file() for file in SAVED):
            loaded = datasets.load_from_disk(name)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as cause:
        reason = " ".join(str(cause).split())
        raise UsageError(f"{spec}: cannot be loaded ({reason:.200})") from cause
    if not {"messages", "text"} & set(rows.column_names):
        columns = ", ".join(rows.column_names)
        raise UsageError(f"{spec}: needs a column 'messages' or 'text'; its columns: {columns}")
    checked: Iterable[Mapping[str, Any]] = rows
    return checked

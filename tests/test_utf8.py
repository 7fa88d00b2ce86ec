from pathlib import Path

import pytest

from edgekit.errors import UsageError
from edgekit.utf8 import read_text


def test_unreadable_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8 text"):
        read_text(tmp_path / "latin")
    with pytest.raises(UsageError, match=r"none: cannot be read \(No such file"):
        read_text(tmp_path / "none")

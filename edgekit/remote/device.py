"""A device over SSH: one connection, authenticated once, which all that runs there goes through."""

import contextlib
import inspect
import json
import os
import re
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

from edgekit.command import last_line
from edgekit.errors import EngineError, UsageError
from edgekit.remote import there

__all__ = ["LOST", "Device", "connected"]

OPTIONS = (  # a user's own words come before these, and ssh takes the first of two
    "-T",
    "-oBatchMode=yes",
    "-oConnectTimeout=10",
    "-oServerAliveInterval=15",
    "-oServerAliveCountMax=4",
    "-oClearAllForwardings=yes",
    "-oRemoteCommand=none",
)
PYTHON = (3, 11)
VERSION = "import sys; print(*sys.version_info[:2])"
LOST = 255  # ssh's own exit code for a connection that failed
GRACE = 2 * there.GRACE
BEAT = there.SILENCE / 6
FULL = ("No space left on device", "Disk quota exceeded")
SOURCE = inspect.getsource(there)


@contextlib.contextmanager
def connected(host: str, python: str = "python3", ssh: Sequence[str] = ()) -> Iterator["Device"]:
    """Connect to `host` for as long as the block lasts.

    Args:
        host: as `ssh` takes it: `user@device`, or a name from its configuration.
        python: the Python there, a path or a name on its PATH.
        ssh: further words for `ssh`, such as `("-p", "2222")`.

    Raises:
        UsageError: if `host` is no host.
        EngineError: if it cannot be reached, refuses us, or has no Python that is new enough.
    """
    if not re.fullmatch(r"[^-\s/][^\s/]*", host):
        raise UsageError(f"host {host!r} given; allowed: user@device, or a name that ssh knows")
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        client = ("ssh", *ssh, *OPTIONS, "-S", f"{folder}/s")
        _open(client, host)
        try:
            yield Device(host, (*client, "-oControlMaster=no"), python)
        finally:
            subprocess.run([*client, "-O", "exit", "--", host], capture_output=True, check=False)


def _open(client: Sequence[str], host: str) -> None:
    """Start the process that holds the connection; it ends by itself a minute after its last use.

    Its errors go to a file: it stays, and would keep a pipe open.
    """
    master = [*client, "-M", "-oControlPersist=60", "-N", "-f", "--", host]
    with tempfile.TemporaryFile() as told:
        try:
            done = subprocess.run(
                master, stdin=subprocess.DEVNULL, stdout=told, stderr=told, check=False
            )
        except FileNotFoundError as cause:
            raise EngineError("ssh is not installed here; install OpenSSH's client") from cause
        told.seek(0)
        if done.returncode:
            raise EngineError(f"{host}: {_refusal(told.read().decode(errors='replace'), host)}")


def _refusal(told: str, host: str) -> str:
    if "Permission denied" in told or "Too many authentication failures" in told:
        return (
            f"the device refused the authentication ({_last(told)}); no password is asked for: "
            f"put a key there with `ssh-copy-id {host}`, or unlock yours with `ssh-add`"
        )
    if "Host key verification failed" in told:
        return f"its host key is not known, or has changed; see what `ssh {host}` says"
    return f"cannot be reached ({_last(told)}); see whether `ssh {host}` works"


class Device:
    """A connected device; `connected` makes one.

    Attributes:
        host: as it was given.
        ssh: the command that goes through the connection, up to the host.
        python: the Python there.
        cache: the directory there that is ours.
        has_rsync: whether it is installed there.
        has_venv: whether its Python can make virtual environments with pip.
    """

    def __init__(self, host: str, ssh: Sequence[str], python: str) -> None:
        self.host = host
        self.ssh = tuple(ssh)
        self.python = python
        self._check_python()
        facts = self.ask("facts")
        self.cache: str = facts["cache"]
        self.has_rsync: bool = facts["rsync"]
        self.has_venv: bool = facts["venv"]

    def _check_python(self) -> None:
        needed = ".".join(map(str, PYTHON))
        command = self._command(self.python, "-c", VERSION)
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        if done.returncode == LOST:
            raise self.failed("", done.stderr, LOST)
        version = re.search(r"(\d+) (\d+)\s*\Z", done.stdout)
        if done.returncode or version is None:
            raise EngineError(
                f"{self.host}: no Python there ({_last(done.stderr)}); install Python {needed} or "
                "newer, or say where it is"
            )
        if (int(version[1]), int(version[2])) < PYTHON:
            raise EngineError(
                f"{self.host}: {self.python} there is Python {version[1]}.{version[2]}; "
                f"install {needed} or newer, or say where it is"
            )

    def ask(self, verb: str, *words: str, given: object = None) -> Any:
        """What a verb of `there.py` says.

        Args:
            verb: its name.
            words: its arguments.
            given: plain data for its input.

        Raises:
            EngineError: if it fails, with its last line.
        """
        return json.loads(self.send(verb, *words, data=[json.dumps(given).encode()]) or "null")

    def send(self, verb: str, *words: str, data: Iterable[bytes]) -> str:
        """Feed `data` to a verb of `there.py`; returns what it prints, and raises as `ask` does."""
        with self._started(verb, *words) as process:
            with contextlib.suppress(BrokenPipeError):  # why it went is told below
                for block in data:
                    _open_end(process.stdin).write(block)
                _open_end(process.stdin).close()
            return self._finished(process, f"{verb} failed there")

    def run(
        self,
        command: Sequence[str],
        failure: str,
        told: Callable[[str], object] = lambda line: None,
    ) -> str:
        """Run a program there, which is stopped if this is interrupted or the connection is lost.

        Args:
            command: the program and its arguments.
            failure: said in the error, before the program's last line.
            told: called with each line that it writes to stderr, in a thread of its own.

        Returns:
            What it writes to stdout.

        Raises:
            EngineError: if it fails.
        """
        with self._held("run", *command) as process:
            return self._finished(process, failure, told)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other runs off this device: they would write to the same files and spoil timings.

        Raises:
            EngineError: if one is at work there.
        """
        with self._held("lock", f"{self.cache}/lock") as process:
            if not any(b'"locked"' in line for line in _open_end(process.stdout)):
                self._finished(process, "could not be locked")
            yield
            _open_end(process.stdin).close()

    @contextlib.contextmanager
    def _started(self, verb: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """A verb of `there.py` under way, out of reach of this terminal's Ctrl-C.

        On any exception its input is closed, which is its word to stop, and it is waited for.
        """
        command = self._command(self.python, "-I", "-c", SOURCE, verb, *words)
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        ) as process:
            try:
                yield process
            except BaseException:
                _stop(process)
                raise

    @contextlib.contextmanager
    def _held(self, verb: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """A verb that lasts as long as it hears from us."""
        ended = threading.Event()
        with self._started(verb, *words) as process:
            beat = threading.Thread(target=_beat, args=(_open_end(process.stdin), ended))
            beat.start()
            try:
                yield process
            finally:
                ended.set()
                beat.join()

    def _command(self, *words: str) -> list[str]:
        return [*self.ssh, "--", self.host, shlex.join(words)]

    def _finished(
        self,
        process: subprocess.Popen[bytes],
        failure: str,
        told: Callable[[str], object] = lambda line: None,
    ) -> str:
        lines: list[str] = []
        listener = threading.Thread(
            target=_listen, args=(_open_end(process.stderr), lines, told), daemon=True
        )
        listener.start()
        output = _open_end(process.stdout).read()
        code = process.wait()
        listener.join()
        if code:
            raise self.failed(failure, "\n".join(lines), code)
        return output.decode(errors="replace").partition(there.START)[2].strip()

    def failed(self, failure: str, told: str, code: int) -> EngineError:
        """The error of a command that ended with a `code`, having `told` something on stderr."""
        full = next((line for line in told.splitlines() if any(s in line for s in FULL)), None)
        if full is not None:
            return EngineError(f"{self.host}: the disk there is full ({full}); make room")
        if code == LOST:
            why = _last(told)
            return EngineError(f"{self.host}: the connection was lost ({why}); run it again")
        return EngineError(f"{self.host}: {failure}: {_last(told)}")


def _listen(stream: IO[bytes], lines: list[str], told: Callable[[str], object]) -> None:
    for line in stream:
        text = line.decode(errors="replace").rstrip()
        lines.append(text)
        told(text)


def _beat(pipe: IO[bytes], ended: threading.Event) -> None:
    with contextlib.suppress(OSError, ValueError):  # it has ended, or was closed
        while not ended.wait(BEAT):
            os.write(pipe.fileno(), b".")  # past the buffer, which would fail again when closed


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        _open_end(process.stdin).close()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()


def _open_end(pipe: IO[bytes] | None) -> IO[bytes]:
    """A pipe that was asked for."""
    assert pipe is not None
    return pipe


def _last(told: str) -> str:
    """The last line, without what a command puts before an error."""
    return re.sub(r"^(edgekit: error|ERROR): ", "", last_line(told))

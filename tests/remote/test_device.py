"""One connection: who is let in, what runs there, and that it stops with what runs here."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import EngineError, UsageError
from edgekit.remote import device as remote
from edgekit.remote import there
from edgekit.remote.device import Device, connected

HOST = "127.0.0.1"
SLEEPER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, file=sys.stderr, flush=True)
time.sleep(600)
"""
INTERRUPTED = 130
RUNNER = f"""
import json, signal, sys
from edgekit.remote.device import connected
signal.signal(signal.SIGINT, signal.default_int_handler)
host, ssh, code = sys.argv[1:]
try:
    with connected(host, sys.executable, json.loads(ssh)) as device:
        device.run([sys.executable, "-c", code], "failed", lambda line: print(line, flush=True))
except KeyboardInterrupt:
    sys.exit({INTERRUPTED})
"""


@pytest.fixture
def device(server: Any) -> Iterator[Device]:
    with connected(HOST, sys.executable, server.ssh) as connection:
        yield connection


def refusal(server: Any, *ssh: str, host: str = HOST, python: str = "python3") -> str:
    """The error of connecting."""
    with pytest.raises(EngineError) as found, connected(host, python, (*ssh, *server.ssh)):
        pass
    message = str(found.value)
    assert "\n" not in message
    return message


def test_programs_get_their_words_as_they_are(device: Device) -> None:
    words = ["a b", "it's", '"', "$HOME", "`id`", "*", "", "a\nb", "\\", "ü"]
    said = device.run([sys.executable, "-c", "import sys; print(sys.argv[1:])", *words], "failed")
    assert said == str(words)


def test_lines_of_stderr_are_told_and_the_last_is_the_error(device: Device) -> None:
    told: list[str] = []
    code = "import sys; print('one', file=sys.stderr); sys.exit('ERROR: two')"
    with pytest.raises(EngineError, match=r"^127\.0\.0\.1: it failed: two$"):
        device.run([sys.executable, "-c", code], "it failed", told.append)
    assert told == ["one", "ERROR: two"]


def test_what_a_shell_prints_first_is_left_out(start_server: Callable[..., Any]) -> None:
    noisy = start_server('ForceCommand echo welcome; eval "$SSH_ORIGINAL_COMMAND"')
    with connected(HOST, sys.executable, noisy.ssh) as device:
        assert device.run(["echo", "heard"], "failed") == "heard"


def test_nobody_listens(server: Any) -> None:
    message = refusal(server, "-p", "1")
    assert message.startswith("127.0.0.1: cannot be reached (ssh: connect to host 127.0.0.1 port 1")


def test_a_stranger_is_refused_without_a_question(
    start_server: Callable[..., Any], keys: Path
) -> None:
    message = refusal(start_server(f"AuthorizedKeysFile {keys / 'stranger.pub'}"))
    assert "refused the authentication" in message
    assert "ssh-copy-id 127.0.0.1" in message


def test_an_unknown_host_key_is_not_taken(server: Any) -> None:
    message = refusal(server, "-oUserKnownHostsFile=/dev/null", "-oStrictHostKeyChecking=ask")
    assert "its host key is not known, or has changed" in message


def test_no_python(server: Any) -> None:
    assert "no Python there (" in refusal(server, python="/nowhere/python")


def test_an_old_python(server: Any, tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 3 9\n")
    old.chmod(0o755)
    message = refusal(server, python=str(old))
    assert "is Python 3.9; install 3.11 or newer" in message


def test_no_ssh_here(server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal(server) == "ssh is not installed here; install OpenSSH's client"


@pytest.mark.parametrize("host", ["", "-oProxyCommand=x", "a b", "ssh://a", "a\n"])
def test_what_is_no_host(host: str) -> None:
    with pytest.raises(UsageError, match="allowed: user@device"), connected(host):
        pass


def test_one_run_at_a_time(device: Device) -> None:
    at_work = "another edgekit is at work there"
    with device.exclusive(), pytest.raises(EngineError, match=at_work), device.exclusive():
        pass
    with device.exclusive():
        pass


def test_an_interruption_here_stops_it_there(server: Any) -> None:
    """In a process of its own, as the signal of Ctrl-C is for the whole process."""
    words = (RUNNER, HOST, json.dumps(server.ssh), SLEEPER)
    here = subprocess.Popen([sys.executable, "-c", *words], stdout=subprocess.PIPE, text=True)
    with here:
        assert here.stdout is not None
        pids = [int(pid) for pid in here.stdout.readline().split()]
        here.send_signal(signal.SIGINT)
        assert here.wait(timeout=30) == INTERRUPTED
    assert len(pids) == 2
    assert gone(pids, seconds=0.5)  # it was waited for


def test_a_lost_connection_stops_it_there(server: Any, wire: Callable[..., Any]) -> None:
    pids: list[int] = []
    link = wire(server)

    def cut(line: str) -> None:
        if not pids:
            pids.extend(map(int, line.split()))
            link.cut()

    with (
        pytest.raises(EngineError, match="the connection was lost"),
        connected(HOST, sys.executable, server.through(link)) as device,
    ):
        device.run([sys.executable, "-c", SLEEPER], "failed", cut)
    assert len(pids) == 2
    assert gone(pids, seconds=20)


@pytest.mark.parametrize("beat", [0.2, 60.0], ids=["heard from", "silent"])
def test_a_program_runs_while_it_hears_from_us(
    server: Any, monkeypatch: pytest.MonkeyPatch, beat: float
) -> None:
    """A network that just goes away ends no connection there for hours."""
    short = remote.SOURCE.replace(f"SILENCE = {there.SILENCE}", "SILENCE = 2.0")
    assert short != remote.SOURCE
    monkeypatch.setattr(remote, "SOURCE", short)
    monkeypatch.setattr(remote, "BEAT", beat)
    with connected(HOST, sys.executable, server.ssh) as device:
        if beat < 1:
            assert device.run(["sh", "-c", "sleep 4; echo done"], "failed") == "done"
            return
        with pytest.raises(EngineError, match="failed: no message"):
            device.run(["sleep", "600"], "failed")


def gone(pids: list[int], seconds: float) -> bool:
    """Whether the processes end within so many seconds."""
    deadline = time.monotonic() + seconds
    while any(map(_alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _alive(pid: int) -> bool:
    """A process that has ended and is only remembered has no command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False

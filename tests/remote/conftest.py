"""A real SSH server on loopback, as the present user, with keys and settings of its own."""

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from edgekit.bundle import describe_files, read_manifest, write_manifest
from edgekit.export.pipeline import convert

HOST = "127.0.0.1"
SEPARATION = Path("/run/sshd")  # a server of root's insists on it
SERVER = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server.

    Attributes:
        port: where it listens.
        cache: edgekit's directory there.
        ssh: what `ssh` must be told.
    """

    port: int
    cache: Path
    ssh: tuple[str, ...]

    def through(self, wire: "Wire") -> tuple[str, ...]:
        """What `ssh` must be told to go through a wire."""
        return ("-p", str(wire.port), *self.ssh)


StartServer = Callable[..., Server]


class Wire:
    """A relay to a server that counts the bytes going there, and is cut after `limit` of them."""

    def __init__(self, port: int, limit: int | None = None) -> None:
        self.sent = 0
        self._to, self._limit = port, limit
        self._listener = socket.create_server((HOST, 0))
        self._ends: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for end in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((HOST, self._to))
                self._ends += [client, server]
                threading.Thread(target=self._up, args=(client, server), daemon=True).start()
                threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 14):
                self.sent += len(data)
                if self._limit is not None and self.sent > self._limit:
                    self.cut()
                server.sendall(data)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 14):
                client.sendall(data)


@pytest.fixture
def wire() -> Iterator[Callable[..., Wire]]:
    made: list[Wire] = []

    def make(server: Server, limit: int | None = None) -> Wire:
        made.append(Wire(server.port, limit))
        return made[-1]

    yield make
    for each in made:
        each.cut()


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the private keys `host`, `ours` and `stranger`, and the public ones."""
    if SERVER is None or shutil.which("ssh") is None:
        pytest.skip("there is no SSH server, or no client; install OpenSSH's")
    folder = tmp_path_factory.mktemp("keys")
    for name in ("host", "ours", "stranger"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return folder


@pytest.fixture
def start_server(keys: Path, tmp_path: Path) -> Iterator[StartServer]:
    """`start_server("ForceCommand ...", PATH="/bin")` starts one, with settings and variables."""
    if os.geteuid() == 0:
        try:
            SEPARATION.mkdir(mode=0o755, exist_ok=True)
        except OSError:
            pytest.skip(f"{SEPARATION} cannot be made, and root's SSH server needs it")
    running: list[subprocess.Popen[bytes]] = []

    def start(*settings: str, **variables: str) -> Server:
        folder = tmp_path / f"server-{len(running)}"
        folder.mkdir()
        port, cache = _free_port(), tmp_path / "a device's cache"
        variables = {"EDGEKIT_CACHE": str(cache), **variables}
        config = _write_server_config(folder, keys, port, settings, variables)
        with (folder / "log").open("wb") as log:
            running.append(subprocess.Popen([str(SERVER), "-D", "-e", "-f", config], stderr=log))
        _wait_for(port, running[-1], folder / "log")
        ssh = ("-F", str(_write_client_config(folder, keys, port)))
        return Server(port=port, cache=cache / "remote", ssh=ssh)

    yield start
    for process in running:
        process.terminate()
        process.wait()


@pytest.fixture
def server(start_server: StartServer) -> Server:
    return start_server()


@pytest.fixture(params=["rsync", "append"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """How files are copied: with rsync, or as where there is none."""
    if request.param == "rsync" and shutil.which("rsync") is None:
        pytest.skip("there is no rsync")
    if request.param == "append":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "ssh").symlink_to(str(shutil.which("ssh")))
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """For OpenVINO; read-only."""
    out = tmp_path_factory.mktemp("remote") / "tiny"
    options = {"mixer": "lawcat", "weights": "fp32", "formats": ("openvino",)}
    convert(tiny_checkpoint("llama"), out, verify=False, **options)
    return out


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Of one's own, with 12 MB that do not compress and names that need care."""
    own = tmp_path / "a bundle's copy"
    shutil.copytree(tiny_bundle, own)
    (own / "a folder").mkdir()
    (own / "a folder" / "$(touch ü); 'x'").write_bytes(b"")
    (own / "#ballast.bin").write_bytes(os.urandom(12_000_000))
    write_manifest(own, replace(read_manifest(own), files=describe_files(own)))
    return own


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])


def _write_server_config(
    folder: Path, keys: Path, port: int, settings: tuple[str, ...], variables: dict[str, str]
) -> str:
    own = " ".join(f'"{name}={value}"' for name, value in variables.items())
    lines = (  # the first of two settings counts
        *settings, f"SetEnv {own}", f"Port {port}", f"ListenAddress {HOST}", "PidFile none",
        "UsePAM no", "StrictModes no", "PasswordAuthentication no",
        "KbdInteractiveAuthentication no", f"HostKey {keys / 'host'}",
        f"AuthorizedKeysFile {keys / 'ours.pub'}",
    )  # fmt: skip
    path = folder / "sshd_config"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def _write_client_config(folder: Path, keys: Path, port: int) -> Path:
    public = (keys / "host.pub").read_text()
    (folder / "known_hosts").write_text(f"edgekit-test {public}")
    lines = (
        "Host *", f"Port {port}", f"IdentityFile {keys / 'ours'}", "IdentitiesOnly yes",
        "IdentityAgent none", "HostKeyAlias edgekit-test",
        f"UserKnownHostsFile {folder / 'known_hosts'}",
    )  # fmt: skip
    path = folder / "ssh_config"
    path.write_text("\n".join(lines) + "\n")
    return path


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port)):
            return
        time.sleep(0.02)
    pytest.fail(f"the SSH server did not start: {log.read_text()}")

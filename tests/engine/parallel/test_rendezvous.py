"""Ranks that cannot join end with one sentence that names the option to use."""

import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from launches import ROOT, environment

from iomm.config import InputError
from iomm.engine import launch
from iomm.engine.parallel import cpu_ranks
from iomm.engine.parallel import ranks as group
from iomm.engine.parallel.cpu_ranks import free_port

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def variables(monkeypatch):
    """Return a function that sets the variables of a launcher and removes all others."""

    def replace(**values):
        for name in (*NAMES, "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return replace


@pytest.fixture
def taken():
    """Return a port at which another program listens."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK is 2, but WORLD_SIZE is 2: ranks are counted from 0"),
        ({"RANK": -1, "WORLD_SIZE": 2}, "variable RANK must be a whole number >= 0, got '-1'"),
        ({"RANK": "one", "WORLD_SIZE": 2}, "variable RANK must be a whole number >= 0, got 'one'"),
        ({"RANK": 1}, "WORLD_SIZE is not set, but RANK is 1"),
        ({"WORLD_SIZE": 8}, "RANK is not set, but WORLD_SIZE is 8"),
        ({"RANK": 0, "WORLD_SIZE": ""}, "variable WORLD_SIZE must be a whole number"),
        ({"LOCAL_RANK": "x"}, "variable LOCAL_RANK must be a whole number"),
    ],
)
def test_wrong_variables_of_a_launcher(values, message, variables, capsys):
    variables(**values)
    assert launch.main(["--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("iomm: ") and message in line


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "several ranks need MASTER_ADDR and MASTER_PORT"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 70000}, "MASTER_PORT must be a whole number"),
        (
            {"MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": 29999},
            "the host 'no.such.host.invalid' of rank 0 is unknown .* --master_addr",
        ),
    ],
)
def test_wrong_addresses_of_rank_0(values, message, variables):
    variables(RANK=1, WORLD_SIZE=2, **values)
    with pytest.raises(InputError, match=message):
        group.check_address()


def test_a_port_in_use_names_the_option(variables, taken):
    variables(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=taken)
    with pytest.raises(InputError, match=rf"port {taken} cannot be used .* --master_port"):
        group.check_address()
    # The other ranks only connect to it, and a free port stays free.
    variables(RANK=1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=taken)
    group.check_address()
    variables(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    group.check_address()
    group.check_address()


JOIN = """
import sys
from types import SimpleNamespace
from iomm.config import InputError
from iomm.engine.parallel import ranks
try:
    joined = ranks.start(float(sys.argv[1]))
    print("JOINED", joined.size)
except InputError as error:
    print("REFUSED", error)
ranks.stop()
"""


def join(timeout_s, **values):
    """Return what a process prints that joins the ranks described by its environment."""
    kept = {name: text for name, text in environment().items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-P", "-c", JOIN, str(timeout_s)],
        env={**kept, **{name: str(value) for name, value in values.items()}},
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_one_rank_needs_no_fixed_port(taken):
    """DeepSpeed's launcher gives every job the same port by default."""
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    assert "JOINED 1" in join(60, **values, MASTER_ADDR="127.0.0.1", MASTER_PORT=taken)


def test_an_unreachable_rank_0_ends_with_a_sentence():
    values = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2}
    port = free_port()
    printed = join(1, **values, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    (line,) = [line for line in printed.splitlines() if line.startswith("REFUSED")]
    assert f"rank 1 could not join the 1 other rank(s) at 127.0.0.1:{port} within" in line
    assert "check --master_addr, --master_port and the network" in line


def test_ranks_that_rank_0_starts_need_no_fixed_port(variables, taken, monkeypatch):
    """Neither the port of DeepSpeed's launcher nor the store that torchrun serves for one rank."""
    started = []

    def popen(words, env):
        started.append(env)
        return SimpleNamespace(poll=lambda: 0, wait=lambda limit: 0, kill=lambda: None)

    monkeypatch.setattr(cpu_ranks.subprocess, "Popen", popen)
    rank_0 = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_SIZE": 1}
    variables(**rank_0, MASTER_ADDR="10.0.0.1", MASTER_PORT=taken)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with cpu_ranks.Peers(2, 1):
        group.check_variables()
        group.check_address()
    (peer,) = started
    assert peer["RANK"] == "1" and peer["WORLD_SIZE"] == "2" and peer["MASTER_ADDR"] == "127.0.0.1"
    assert int(peer["MASTER_PORT"]) != taken and "TORCHELASTIC_USE_AGENT_STORE" not in peer

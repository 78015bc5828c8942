"""torchrun inside this process: two small processes that import no torch, so that each test takes a second."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from luthier import torchrun
from luthier.torchrun import LaunchError, Plan, run

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from luthier import ranks
from luthier.core.errors import DataError

folder, rank = Path(sys.argv[-1]), int(os.environ["RANK"])

def main(argv):
    {body}
    return 0

from luthier import cli
cli._dispatch = main
ranks.leave(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(body, **plan) runs `body` in two processes and gives the exit code."""
    monkeypatch.setattr(torchrun, "devices", lambda: 0)
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "LUTHIER_STARTED", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    folder = tmp_path / "a folder"
    folder.mkdir()

    def started(body, argv=(), **plan):
        script = folder / "two ranks.py"
        script.write_text(SCRIPT.format(body=body.replace("\n", "\n    ")))
        return run(Plan(**{"processes": 2, **plan}), [*argv, str(folder)], program=(str(script),))

    started.folder = folder
    return started


def test_arguments_stay_whole_and_processes_know_their_number(start, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    asked = ["my data/a b.yaml", "output_dir=x y", "--text", "it's"]
    names = '("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "LUTHIER_STARTED")'
    body = f'(folder / f"{{rank}}.json").write_text(json.dumps([argv, {{n: os.environ[n] for n in {names}}}]))'
    before = time.time()
    assert start(body, asked) == 0
    for rank in range(2):
        argv, environ = json.loads((start.folder / f"{rank}.json").read_text())
        assert argv == [*asked, str(start.folder)]
        assert before <= float(environ.pop("LUTHIER_STARTED")) <= time.time()
        assert environ == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "3",
        }
    assert logging.root.manager.disable == 0, "only torchrun's own words were left out"


def test_one_ranks_mistake_is_said_once_and_is_exit_code_2(start, capfd):
    body = 'if rank: raise DataError("row 7 of b.jsonl is odd")\ntime.sleep(30)'
    assert start(body) == 2
    assert capfd.readouterr().err.strip().splitlines()[-1:] == ["error: row 7 of b.jsonl is odd"]


def test_all_ranks_mistake_is_said_once(start, capfd):
    assert start('raise DataError("no such key")') == 2
    err = capfd.readouterr().err
    assert err.count("no such key") == 1 and "Traceback" not in err


def test_a_killed_process_is_named(start, capfd):
    assert start("if rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(30)") == 137
    err = capfd.readouterr().err
    assert "error: the process of rank 1 was ended by SIGKILL. Most often the machine ran out of memory." in err
    assert "Traceback" not in err


def test_lost_processes_are_started_again(start):
    body = (
        'count = os.environ["TORCHELASTIC_RESTART_COUNT"]\n'
        '(folder / f"{rank}-{count}").touch()\n'
        'if rank and count == "0": os._exit(9)'
    )
    assert start(body, restarts=1) == 0
    assert {path.name for path in start.folder.iterdir()} >= {"1-0", "0-1", "1-1"}


def test_signals_that_end_nothing_are_not_counted(start, monkeypatch):
    before = signal.signal(signal.SIGCHLD, lambda number, frame: None)  # as a DataLoader with workers does
    try:
        body = "time.sleep(rank)\nif os.environ['TORCHELASTIC_RESTART_COUNT'] != '2': os._exit(9)"
        assert start(body, restarts=2) == 0
    finally:
        signal.signal(signal.SIGCHLD, before)


def _when(ready: list[Path], signals: list[signal.Signals]) -> None:
    """Send this process signals as soon as files exist."""

    def send():
        end = time.monotonic() + 60
        while not all(path.exists() for path in ready) and time.monotonic() < end:
            time.sleep(0.02)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    threading.Thread(target=send, daemon=True).start()


SAVES = """
def stop(number, frame):
    time.sleep({pause})
    (folder / f"{{rank}}.saved").touch()
    os._exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
(folder / f"{{rank}}.ready").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_process_and_is_waited_for(start, number, code):
    before = signal.getsignal(number)
    _when([start.folder / f"{rank}.ready" for rank in range(2)], [number])
    assert start(SAVES.format(pause=0.5)) == code
    assert (start.folder / "0.saved").exists() and (start.folder / "1.saved").exists()
    assert signal.getsignal(number) is before


def test_a_third_signal_waits_for_nobody(start):
    _when([start.folder / f"{rank}.ready" for rank in range(2)], [signal.SIGTERM] * 3)
    began = time.monotonic()
    assert start(SAVES.format(pause=50).replace("signal.signal(signal.SIGINT, stop)", "")) == 143
    assert time.monotonic() - began < 30
    assert not (start.folder / "0.saved").exists()


class _Probe(socket.socket):
    """Says that it would send from 10.77.0.2, and sends nothing."""

    def connect(self, address):
        self.asked = address

    def getsockname(self):
        return ("127.0.0.1" if self.asked[0] == "localhost" else "10.77.0.2", 4711)


@pytest.mark.parametrize(
    "own, master, expected",
    [
        ("127.0.1.1", "10.77.0.1", "ens5"),
        ("127.0.1.1", "localhost", None),  # two groups of processes of one machine
        ("10.77.0.2", "10.77.0.1", None),  # gloo finds the way by itself
    ],
)
def test_the_interface_that_leads_to_the_other_nodes(monkeypatch, own, master, expected):
    def card(address):
        return [SimpleNamespace(address="fe80::1"), SimpleNamespace(address=address)]

    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": card("127.0.0.1"), "ens5": card("10.77.0.2")})
    monkeypatch.setattr(socket, "gethostbyname", lambda name: own)
    monkeypatch.setattr(socket, "socket", _Probe)
    assert torchrun.interface_to(master) == expected


def test_nodes_that_cannot_meet(start):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"did not meet at 127.0.0.1:{port}: .*MASTER_PORT"):
            start("pass", nodes="2", node_rank=0, master_addr="127.0.0.1", master_port=port)

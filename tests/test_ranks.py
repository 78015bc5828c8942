"""One of several processes: who speaks, how it ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from luthier import cli, ranks
from luthier.core.errors import DataError


@pytest.fixture
def rank(monkeypatch, tmp_path):
    """Makes this process a rank as torchrun would start it."""

    def become(number, attempt=0):
        folder = tmp_path / f"attempt_{attempt}" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))

    return become


@pytest.mark.parametrize(
    "argv, kept, local_rank",
    [
        (["--local_rank=3", "train", "a.yaml"], ["train", "a.yaml"], "3"),
        (["train", "--local-rank", "1", "a.yaml"], ["train", "a.yaml"], "1"),
        (["train", "a.yaml", "lora_rank=4"], ["train", "a.yaml", "lora_rank=4"], None),
    ],
)
def test_what_launchers_put_in_front_is_no_argument(monkeypatch, argv, kept, local_rank):
    monkeypatch.setenv("LOCAL_RANK", "x")
    monkeypatch.delenv("LOCAL_RANK")
    assert ranks.without_local_rank(argv) == kept
    assert os.environ.get("LOCAL_RANK") == local_rank


def test_the_first_to_fail_speaks(rank, tmp_path):
    rank(1)
    assert ranks.speaks_first(2)
    rank(0)
    assert not ranks.speaks_first(1)
    assert ranks.failed_first(tmp_path) == 2
    rank(0, attempt=1)
    assert ranks.speaks_first(3), "another attempt may fail for another reason"
    assert ranks.failed_first(tmp_path) == 3
    assert ranks.failed_first(tmp_path / "attempt_2") is None


def test_without_torchrun_everybody_speaks(monkeypatch, rank):
    rank(1)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert ranks.speaks_first(2) and ranks.speaks_first(2)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/nowhere/attempt_0/1/error.json")
    assert ranks.speaks_first(2) and ranks.speaks_first(2)


def test_one_message_for_one_mistake(rank, capsys):
    for number in (1, 0):
        rank(number)
        assert cli.main(["nonsense"]) == 2
    assert capsys.readouterr().err.count("there is no command 'nonsense'") == 1


def test_who_loses_the_others_keeps_it_short(rank, capsys):
    def lost():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:12")

    rank(0)
    assert ranks.guarded(lost) == 1
    assert capsys.readouterr().err == "rank 0 stops, because another process is gone (Connection closed by peer).\n"
    rank(1)
    assert ranks.guarded(lost) == 1
    assert capsys.readouterr().err == ""


def test_who_never_reached_the_others_is_told_of_the_interface(rank, capsys):
    def unreached():
        raise RuntimeError("Gloo connectFullMesh failed with timed out connecting: Connection refused, [127.0.0.1]:2")

    rank(0)
    assert ranks.guarded(unreached) == 1
    said = capsys.readouterr().err
    assert "rank 0 cannot connect" in said and "[127.0.0.1]:2" in said and "GLOO_SOCKET_IFNAME" in said


def test_a_defect_is_shown_with_its_rank(rank, capsys):
    def defect():
        return 1 / 0

    rank(1)
    assert ranks.guarded(defect) == 1
    said = capsys.readouterr().err
    assert said.startswith("rank 1:\nTraceback") and "ZeroDivisionError" in said


def test_alone_nothing_is_caught(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    def fails():
        raise DataError("odd")

    with pytest.raises(DataError):
        ranks.guarded(fails)
    assert ranks.guarded(lambda: 3) == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel tells children of their parent's death")
def test_nobody_trains_on_without_a_launcher(tmp_path):
    mark = tmp_path / "ended"
    child = (
        "import os, signal, sys, time\n"
        "from luthier import ranks\n"
        "os.environ |= {'RANK': '0', 'WORLD_SIZE': '1'}\n"
        f"signal.signal(signal.SIGTERM, lambda *a: (open({str(mark)!r}, 'w').close(), os._exit(0)))\n"
        "ranks.follow_parent()\n"
        "print('ready', flush=True)\n"
        "time.sleep(30)\n"
    )
    parent = (
        "import subprocess, sys, os, signal\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "p.stdout.readline()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", parent], timeout=30)
    for _ in range(100):
        if mark.exists():
            return
        subprocess.run(["sleep", "0.05"], check=True)
    pytest.fail("the child did not hear of its parent's death")

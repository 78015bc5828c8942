"""What every benchmark here needs: a process for each measurement, and figures that say what they rest on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path


def measure(script: str, options: argparse.Namespace, same: Iterable[str], **words: object) -> dict:
    """Run a script again with `words` as its options, and with those of `options` that `same` names.

    Returns the JSON object in the last line it prints. Ends this process where it fails.
    """
    options = {**{name: getattr(options, name) for name in same}, **words}
    command = [sys.executable, script]
    for name, value in options.items():
        command += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def wait_for_device() -> None:
    """Wait until the accelerator, if there is one, has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Most memory used so far: of the accelerator since its statistics were reset, or of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep(file: Path, script: str, found: object, packages: Iterable[str] = ("torch", "transformers")) -> None:
    """Write figures to a JSON file, with what they rest on: command, date, machine, load, versions."""
    about = {
        "command": f"python benchmarks/{Path(script).name} " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[1],
        **{name: version(name) for name in packages},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"about": about, "results": found}, indent=2) + "\n")

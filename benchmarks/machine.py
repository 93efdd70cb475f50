"""What a result was measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lstmfused


def output(*command: str) -> str | None:
    """What `command` prints; None if it is absent or fails."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def processor() -> str:
    if platform.system() == "Darwin":
        name = output("sysctl", "-n", "machdep.cpu.brand_string")
    else:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo(), re.MULTILINE)
        name = found and found[1]
    return name or platform.processor() or platform.machine()


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    commit = output("git", "rev-parse", "HEAD")
    build_info = lstmfused.build_info()
    versions = {
        "python": platform.python_version(),
        **{name: package(name) for name in ("torch", "onnxruntime", "numpy")},
        "lstmfused": build_info.get("lstmfused"),  # of what is loaded, installed or not
    }
    changes = output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "processor": processor(),
        "logical_cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "build_info": build_info,
        "revision": commit,
        "dirty": bool(changes) if commit else None,
    }

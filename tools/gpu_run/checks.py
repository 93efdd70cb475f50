"""The stages before anything is measured: machine, build, smoke, tests, sanitizer."""

from __future__ import annotations

import glob
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .process import ROOT, junit, outcomes, python, run, sanitized
from .record import Clock, Json

SMI_FIELDS = (
    "name,driver_version,pstate,temperature.gpu,power.draw,power.limit,"
    "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
)
EXERCISE = ("-m", "benchmarks.gpu.exercise")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# The tests that need a device, and what the binding says of one.
TESTS = tuple(f"tests/test_cuda{name}.py" for name in ("", "_gradients", "_runtime", "_host"))
WORKERS = "10"  # of pytest: each has a CUDA context of its own


def output(*command: str) -> str | None:
    """What `command` prints; None if it is absent, fails or hangs."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def tool(name: str) -> str | None:
    """On the PATH or where CUDA is installed, the newest first."""
    folders = sorted(glob.glob("/usr/local/cuda*/bin"), reverse=True)
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def slug(name: str) -> str:  # machine.slug can be imported only once lstmfused is built
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def revision(given: str | None) -> Json:
    if given:  # the sources were brought here, and git knows nothing of what they were there
        return {"revision": given, "dirty": None}
    commit = output("git", "rev-parse", "HEAD")
    changes = output("git", "status", "--porcelain", "--untracked-files=no")
    dirty = None if changes is None or not commit else bool(changes)
    return {"revision": commit or "unknown", "dirty": dirty}


def smi(properties: Any) -> dict[str, str] | None:
    uuid = getattr(properties, "uuid", None)
    chosen = [f"--id=GPU-{uuid}"] if uuid else []
    asked = [f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader", *chosen]
    found = output(tool("nvidia-smi") or "nvidia-smi", *asked)
    if not found:
        return None
    return dict(zip(SMI_FIELDS.split(","), found.splitlines()[0].split(", "), strict=False))


def package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine(given_revision: str | None) -> Json:
    import torch

    properties: Any = torch.cuda.get_device_properties(0)
    nvcc = tool("nvcc")
    release = re.search(r", V([\d.]+)", (nvcc and output(nvcc, "--version")) or "")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **revision(given_revision),
        "device": {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", 0),
        },
        "nvidia_smi": smi(properties),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvcc": release[1] if release else None,
            "triton": package("triton"),
        },
        "system": f"{platform.system()} {platform.machine()}",
        "logical_cores": os.cpu_count(),
    }


def stale() -> str | None:
    """Why lstmfused has to be built; asked in a process of its own, for it is imported later."""
    import torch

    asked = "import json, lstmfused as l; print(json.dumps([l._ops._C.__file__, l.build_info()]))"
    try:
        done = subprocess.run(
            python("-c", asked), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        return "importing it takes longer than two minutes"
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:300]
    file, info = json.loads(done.stdout.strip().splitlines()[-1])
    if info["built for torch"] != torch.__version__:
        return f"built for torch {info['built for torch']}"
    if info["cuda kernels built"] == "none":
        return "built without CUDA"
    if Path(file).parent != ROOT / "lstmfused":
        return f"{file} is not of this repository"
    digest = runpy.run_path(str(ROOT / "csrc" / "digest.py"))["digest"]()
    return None if info["digest of the sources"] == digest else "the sources have changed since"


def build(clock: Clock, logs: Path) -> Json:
    reason = stale()
    if reason is None:
        return {"status": "done", "built": False}
    # --force, for setuptools does not look at headers; ninja still leaves out what is up to date.
    command = python("setup.py", "build_ext", "--inplace", "--force")
    env, nvcc = {"LSTMFUSED_CUDA": "1"}, tool("nvcc")
    if nvcc and "CUDA_HOME" not in os.environ:
        env["CUDA_HOME"] = str(Path(nvcc).parents[1])
    found = run(command, logs / "build.log", clock.left(), env)
    if found["timed_out"]:
        wrong: str | None = "it ran out of time"
    else:
        wrong = "it failed" if found["returncode"] != 0 else stale()
    status = "failed" if wrong else "done"
    return {"status": status, "built": True, "reason": reason, "wrong": wrong, **found}


def exercised(log: Path) -> list[Json]:
    """What the exercise has written, one object a line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"precision"')]


def smoke(clock: Clock, logs: Path) -> Json:
    """In a process of its own, for a kernel that hangs or writes astray ends its process."""
    log = logs / "smoke.log"
    found = run(python(*EXERCISE), log, clock.left())
    checked = exercised(log)
    wrong = [entry for entry in checked if entry["error"]]
    right = found["returncode"] == 0 and checked and not wrong
    return {
        "status": "done" if right else "failed",
        "checked": len(checked),
        "wrong": wrong,
        **found,
    }


def tests(clock: Clock, logs: Path, *given: str) -> Json:
    files = given or TESTS
    for file in files:
        if not (ROOT / file).exists():
            return {"status": "left out", "reason": f"{file} not found"}
    report, log = logs / "tests.xml", logs / "tests.log"
    report.unlink(missing_ok=True)
    # Else a warning on import, which pyproject.toml makes an error, would end all tests.
    options: tuple[str, ...] = (
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        "-Wdefault",
    )
    if not given and find_spec("xdist"):
        options += ("-n", WORKERS)
    found = run(python("-m", "pytest", *files, *options), log, max(1, clock.left() - 10))
    parsed = outcomes(log.read_text(encoding="utf-8", errors="replace"))
    with suppress(OSError, SyntaxError):  # killed before it was written; ParseError is the latter
        reported = junit(report.read_text(encoding="utf-8"))
        # The report of an interrupted run counts the test that it was in as passed.
        parsed = {**reported, **({"counts": parsed["counts"]} if found["timed_out"] else {})}
    right = found["returncode"] == 0 and parsed["counts"].get("passed")
    return {"status": "done" if right else "failed", **parsed, **found}


def sanitize(clock: Clock, logs: Path) -> Json:
    """All tools side by side: each is busy on the host most of the time."""
    program = tool("compute-sanitizer")
    if program is None:
        return {"status": "left out", "reason": "compute-sanitizer not found"}
    seconds = clock.left()

    def ran(name: str) -> Json:
        log = logs / f"{name}.log"
        # What other kernels write has to be seen, too, where reads of unwritten memory are sought.
        only = () if name == "initcheck" else ("--kernel-name", "kernel_substring=lstmfused")
        options = ("--tool", name, "--error-exitcode", "99", "--print-limit", "20", *only)
        command = [program, *options, *python(*EXERCISE, "--unchecked")]
        # Without the cache every tensor is an allocation whose borders are known.
        found = run(command, log, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        text = log.read_text(encoding="utf-8", errors="replace")
        return {**sanitized(text), **found, "exercised": len(exercised(log))}

    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        tools = dict(zip(SANITIZERS, pool.map(ran, SANITIZERS), strict=True))
    right = all(t["errors"] == 0 and t["returncode"] == 0 for t in tools.values())
    return {"status": "done" if right else "failed", "program": program, "tools": tools}

"""python -m tools.gpu_run: builds, checks and measures the CUDA cell unattended, within a deadline.

Every stage is a process of its own, the most valuable first, and none can end another. What they
find and what they say is in the folder --out as soon as it is there.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.format import table
from benchmarks.record import ROOT, Clock, Json, Record, describe, load, output

RESERVE = 3.0  # seconds to write and print what was found
GRACE = 10  # seconds between asking a command to end and ending it
LINES = 30  # of a log go into the result
LOST, RESTARTS = 3, 5  # a process that has lost the device; how often another goes on
CARRIED = ROOT / "build" / "carried"  # kernels that another machine has compiled
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
TESTS = tuple(f"tests/test_cuda{name}.py" for name in ("", "_gradients", "_runtime", "_host"))
# -W: else a warning on import, which pyproject.toml makes an error, would end all tests.
PYTEST = ("-v", "--tb=short", "-rfE", "-p", "no:cacheprovider", "-n", "10", "-Wdefault")

Command = tuple[Sequence[str], Mapping[str, str]]  # and what it needs in its environment


def python(*arguments: object, **env: str) -> Command:
    return [sys.executable, *map(str, arguments)], env


def end(process: subprocess.Popen[bytes]) -> None:
    """An interrupt first, for pytest then still sums up."""
    for signal_ in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_)
            process.wait(GRACE)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue  # one that not even SIGKILL ends, in a call to the driver, is left behind


def ran(command: Command, log: Path, seconds: float) -> Json:
    """Its output goes to `log`. No returncode: it ran out of time or could not be started."""
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments, env = command
    start, code = time.monotonic(), None
    # In a session of its own, so that its children end with it.
    given = {"cwd": ROOT, "env": {**os.environ, **env}, "start_new_session": True}
    with log.open("ab") as said:
        try:
            process = subprocess.Popen(  # type: ignore[call-overload]
                arguments, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, **given
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                said.write(f"\nstopped after {seconds:.0f} s\n".encode())
                end(process)
        except OSError as error:
            said.write(f"{arguments[0]}: {error}\n".encode())
    return {"returncode": code, "seconds": round(time.monotonic() - start, 1)}


# --------------------------------------------------------------------------------------------------
# What the logs say


def outcomes(text: str) -> Json:
    """Of pytest -v -rfE, also of one that did not come to its end, and of its workers."""
    words = r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
    found = re.findall(rf"^(?:\[gw\d+\] \[ *\d+%\] {words} \S+::|\S+::.*? {words}\b)", text, re.M)
    counts = Counter(a or b for a, b in found)
    return {"counts": dict(counts), "wrong": re.findall(r"^(?:FAILED|ERROR) (.*::.*)$", text, re.M)}


def exercised(text: str) -> Json:
    """Of tools.exercise: an object a line."""
    lines = [line for line in text.splitlines() if line.startswith('{"dtype"')]
    wrong = [line for line in lines if '"error": null' not in line]
    return {"counts": {"checked": len(lines)}, "wrong": wrong}


def sanitized(text: str) -> Json:
    """Of compute-sanitizer: how many errors it sums up, and the first of them."""
    sums = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    errors = sum(int(a or b) for a, b in sums)
    reports = [line for line in text.splitlines() if line.startswith("=========")]
    return {"counts": {"errors": errors if sums else None}, "wrong": reports[:40] if errors else []}


class Stage(NamedTuple):
    """`share` of what is left when it begins, at most `cap` seconds; commands run side by side."""

    commands: Callable[[float], dict[str, Command]]  # by the name of the log; of the seconds
    share: float
    cap: float = float("inf")
    parse: Callable[[str], Json] = lambda text: {}
    resumes: bool = False  # from its file, should it lose the device or crash


# --------------------------------------------------------------------------------------------------
# Stages


def tool(name: str) -> str | None:
    """On the PATH or where CUDA is installed, the newest first."""
    folders = sorted(map(str, Path("/usr/local").glob("cuda*/bin")), reverse=True)
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def digest() -> str:
    return str(runpy.run_path(str(ROOT / "csrc" / "digest.py"))["digest"]())


def stale() -> str | None:
    """Why lstmfused has to be built; asked in a process of its own, for it is imported later."""
    asked = "import torch, lstmfused; i = lstmfused.build_info(); " + "; ".join(
        f"print({text})"
        for text in (
            "i['built for torch'] == torch.__version__ and 'for this torch'",
            "i['cuda kernels built'] != 'none' and 'with CUDA'",
            f"i['digest of the sources'] == '{digest()}' and 'of these sources'",
            f"lstmfused.__file__.startswith('{ROOT}') and 'in this folder'",
        )
    )
    found = output(sys.executable, "-c", asked)
    return None if found and "False" not in found else f"what is built: {found or 'nothing'}"


def pack() -> None:
    """Keeps the compiled kernels to be carried to a machine where compiling them takes longer."""
    shutil.rmtree(CARRIED, ignore_errors=True)
    CARRIED.mkdir(parents=True)
    for file in ROOT.glob("build/temp*/kernels_*"):
        shutil.copy(file, CARRIED)
    (CARRIED / "digest").write_text(digest())
    print(f"{len(list(CARRIED.iterdir())) - 1} files in {CARRIED.relative_to(ROOT)}")


def unpack() -> None:
    """Puts carried kernels, if of these sources, where the build looks for them; as new files, for
    what was copied here may be dated after the sources."""
    stamp = CARRIED / "digest"
    if stamp.exists() and stamp.read_text() == digest():
        name = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        (ROOT / "build" / name).mkdir(parents=True, exist_ok=True)
        for file in CARRIED.glob("kernels_*"):
            shutil.copy(file, ROOT / "build" / name)


def build(_: float) -> dict[str, Command]:
    if not stale():
        return {}
    unpack()
    nvcc = tool("nvcc")
    known = "CUDA_HOME" in os.environ or not nvcc
    home = {} if known else {"CUDA_HOME": str(Path(str(nvcc)).parents[1])}
    # --force, for setuptools does not look at headers; kernels that are up to date are kept.
    command = ("setup.py", "build_ext", "--inplace", "--force")
    return {"build": python(*command, LSTMFUSED_CUDA="1", **home)}


def built(_: str) -> Json:
    return {"wrong": [reason] if (reason := stale()) else []}


def sanitizer(_: float) -> dict[str, Command]:
    program = tool("compute-sanitizer")
    if program is None:
        raise FileNotFoundError("compute-sanitizer not found")

    def command(name: str) -> Command:
        # What other kernels write has to be seen, too, where reads of unwritten memory are sought.
        only = () if name == "initcheck" else ("--kernel-name", "kernel_substring=lstmfused")
        options = ("--tool", name, "--error-exitcode", "99", "--print-limit", "20", *only)
        watched, _ = python("-m", "tools.exercise", "--unchecked")
        # Without the cache every tensor is an allocation whose borders are known.
        return [program, *options, *watched], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    return {name: command(name) for name in SANITIZERS}


def plan(args: argparse.Namespace) -> dict[str, Stage]:
    """The most valuable first."""
    quick = ("--shapes=512:512,128:128", "--batches=1,32,128", "--dtypes=bfloat16,float32")
    few: tuple[str, ...] = quick if args.quick else ()

    def measuring(module: str, file: Path, *options: str) -> Callable[[float], dict[str, Command]]:
        def commands(seconds: float) -> dict[str, Command]:
            mine = file.exists() and load(file)["revision"] == args.revision
            where = f"--resume={file}" if mine else f"--out={file}"
            given = (*options, where, f"--budget={seconds:.0f}", f"--revision={args.revision}")
            return {file.stem: python("-m", module, *given)}

        return commands

    smoke = {"smoke": python("-m", "tools.exercise")}
    tests = {"tests": python("-m", "pytest", *TESTS, *PYTEST, COLUMNS="200")}
    measured = measuring("benchmarks", args.out / "gpu.json", "--gpu", *few)
    compiled = measuring("benchmarks", args.out / "gpu-compiled.json", "--gpu-compiled")
    crossed = measuring("tools.crossovers", args.out / "crossovers.json", *["--quick"] * args.quick)
    return {
        "build": Stage(build, 0.6, 300, built),
        "smoke": Stage(lambda _: smoke, 0.15, 60, exercised),
        "crossovers": Stage(crossed, 0.25, 120, resumes=True),
        "benchmark": Stage(measured, 0.5, resumes=True),
        "compiled": Stage(compiled, 0.25, 90, resumes=True),
        "tests": Stage(lambda _: tests, 0.65, 180, outcomes),
        "sanitizer": Stage(sanitizer, 1.0, 150, sanitized),
    }


# --------------------------------------------------------------------------------------------------
# The run


def tail(log: Path) -> list[str]:
    """The last lines, without the folder that this repository happens to lie in."""
    text = log.read_text(encoding="utf-8", errors="replace").replace(f"{ROOT}/", "")
    return [line[:300] for line in text.rstrip().splitlines()[-LINES:]]


def done(name: str, stage: Stage, logs: Path, seconds: float) -> Json:
    """Runs a stage; its commands' results, by name, and whether all is right."""
    clock, commands, restarts = Clock(seconds - GRACE), stage.commands(seconds - 2 * GRACE), 0
    with ThreadPoolExecutor(max(1, len(commands))) as pool:
        paths = [logs / f"{log}.log" for log in commands]
        found = list(pool.map(lambda c, p: ran(c, p, clock.left()), commands.values(), paths))
    while stage.resumes and restarts < RESTARTS and clock.left() > 2 * GRACE:
        code = found[0]["returncode"]
        if code is None or 0 <= code != LOST:
            break
        restarts += 1  # another process goes on behind what has taken the device away
        (command,) = stage.commands(clock.left() - GRACE).values()
        found = [ran(command, paths[0], clock.left())]
    for result, path in zip(found, paths, strict=True):
        result |= stage.parse(path.read_text(encoding="utf-8", errors="replace"))
        result["right"] = result["returncode"] == 0 and not result.get("wrong")
        result["tail"] = [] if result["right"] else tail(path)
    status = "done" if all(result["right"] for result in found) else "failed"
    results = dict(zip(commands, found, strict=True))
    return {"status": status, "restarts": restarts, "results": results}


def run(stages: Mapping[str, Stage], out: Path, logs: Path, clock: Clock, data: Json) -> Json:
    """Runs all stages; `data` is on disk after each, and so are the logs, as one file beside it."""
    record = Record(out / "stages.json", data | {"stages": {}})
    for name, stage in stages.items():
        seconds = min(stage.cap, stage.share * (clock.left() - RESERVE))
        start = time.monotonic()
        print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
        try:
            if seconds < 2 * GRACE:
                raise TimeoutError("no time left")
            found = done(name, stage, logs, seconds)
        except (FileNotFoundError, TimeoutError) as error:
            found = {"status": "left out", "reason": str(error)}
        except Exception as error:
            found = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        record.data["stages"][name] = found | {"seconds": round(time.monotonic() - start, 1)}
        record.flush()
        if logs.is_dir():
            shutil.make_archive(str(out / "logs"), "gztar", logs)
    return record.data


def told(data: Json) -> str:
    """The stages, and what went wrong."""
    lines, wrong = [], []
    for name, stage in data["stages"].items():
        results = stage.get("results", {})
        counts = (f"{k}: {r['counts']}" for k, r in results.items() if "counts" in r)
        lines.append([name, stage["status"], f"{stage['seconds']} s", "; ".join(counts)])
        wrong += [f"{name}: {stage['reason']}"] if "reason" in stage else []
        for log, result in results.items():
            said = result.get("wrong") or result["tail"]
            wrong += [f"{log}: {line}" for line in said[-20:]]
    return "\n".join([table(["stage", "", "", ""], lines), *wrong])


def show(out: Path) -> None:
    """What the results in a folder say, each by a process of its own."""
    for name in ("crossovers", "gpu", "gpu-compiled"):
        if (file := out / f"{name}.json").exists():
            command, _ = python("-m", "benchmarks.report", "--show", file)
            subprocess.run(command, cwd=ROOT, check=False)
    print(told(load(out / "stages.json")), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_run", description=__doc__)
    add = parser.add_argument
    add("--deadline", type=float, default=540, metavar="SECONDS", help="for all (default: 540)")
    add("--out", type=Path, default=ROOT / "out" / "gpu", metavar="DIR", help="default: out/gpu")
    add("--logs", type=Path, default=ROOT / "build" / "gpu", metavar="DIR", help="as they grow")
    add("--revision", metavar="R", help="of the sources, where git cannot tell")
    add("--stages", metavar="S,...", help="only these")
    add("--quick", action="store_true", help="a few cells of every kind")
    add("--pack", action="store_true", help="keep compiled kernels in build/carried, and end")
    add("--show", type=Path, metavar="DIR", help="print what is in such a folder, and end")
    args = parser.parse_args()
    if args.pack or args.show:
        pack() if args.pack else show(args.show)
        return 0
    clock, args.out = Clock(args.deadline), args.out.resolve()
    args.revision = args.revision or output("git", "rev-parse", "HEAD") or "unknown"
    shutil.rmtree(args.logs, ignore_errors=True)
    stages = plan(args)
    if args.stages:
        stages = {name: stages[name] for name in args.stages.split(",")}
    data = run(stages, args.out, args.logs.resolve(), clock, describe("run", args.revision))
    show(args.out)
    return int(any(stage["status"] == "failed" for stage in data["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())

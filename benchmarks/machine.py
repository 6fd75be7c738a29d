"""What the machine is, for records."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "apache-tvm", "onnxruntime", "openvino", "nncf", "transformers", "numpy")
FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512vbmi", "avx512_bf16", "amx_int8")


def describe() -> dict[str, Any]:
    """Processor, caches, instruction sets, load, versions, source and command of this run."""
    return {
        "command": _command(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpuinfo("model name"),
        "family": f"{_cpuinfo('cpu family')}/{_cpuinfo('model')}/{_cpuinfo('stepping')}",
        "cores": os.cpu_count(),
        "features": [f for f in FEATURES if f in _cpuinfo("flags").split()],
        "caches": _caches(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average": os.getloadavg()[0],
        "commit": _commit(),
        "versions": _versions(),
    }


def _command(argv: list[str]) -> str:
    """What was called, without folders of this machine: options with a path are left out."""
    name = Path(argv[0]).stem
    module = "benchmarks" if name in ("one", "run", "__main__") else f"benchmarks.{name}"
    words = [word for word in argv[1:] if word not in ("time", "prepare")]
    kept = [
        word
        for i, word in enumerate(words)
        if not word.startswith("/")
        and not (word.startswith("--") and words[i + 1 : i + 2] and words[i + 1].startswith("/"))
    ]
    return " ".join(["python", "-m", module, *kept])


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return platform.processor() or "unknown"


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (
            (index / name).read_text().strip() for name in ("level", "type", "size")
        )
        found[f"L{level} {kind.lower()}"] = size
    return found


def _commit() -> str:
    here = Path(__file__).resolve().parent
    made = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return made.stdout.strip() or "unknown"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found

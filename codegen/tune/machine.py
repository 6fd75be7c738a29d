"""The class of a machine: what must agree for a measured schedule to mean anything."""

import platform
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True, slots=True)
class Machine:
    """A processor model and its caches, of one core.

    Attributes:
        cpu: Vendor, family and model.
        l1_kb: First-level data cache.
        l2_kb: Second-level cache.
    """

    cpu: str
    l1_kb: int
    l2_kb: int

    @property
    def key(self) -> str:
        """Stable text, for records."""
        return f"{self.cpu}, L1 {self.l1_kb} KB, L2 {self.l2_kb} KB"


def this_machine(cpuinfo: Path = _CPUINFO, caches: Path = _CACHES) -> Machine:
    """The class of this machine; what is unknown is "" or 0.

    Args:
        cpuinfo: Description of the processors.
        caches: Folder of the first core's caches.
    """
    words: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        words.setdefault(key.strip(), value.strip())
    names = ("vendor_id", "cpu family", "model")
    cpu = " ".join(words[name] for name in names if name in words)
    sizes = {1: 0, 2: 0}
    for folder in sorted(caches.glob("index*")):
        kind, level, size = (
            (folder / name).read_text().strip() for name in ("type", "level", "size")
        )
        if kind != "Instruction" and int(level) in sizes and size.endswith("K"):
            sizes[int(level)] = int(size[:-1])
    return Machine(cpu or platform.processor() or platform.machine(), sizes[1], sizes[2])

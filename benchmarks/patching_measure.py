"""What one phase costs, measured in the process that does it (Linux: from /proc/self)."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """What a phase took.

    Attributes:
        seconds: wall clock, from when imports are done and the registry is open to the end of the work.
        processor_seconds: time on all cores, user and system; what others do on the machine hardly changes it.
        read, written: bytes through system calls. What is read through a memory map is not among them.
        device_read, device_written: bytes that came from or are to go to the disk; 0 read means all was cached.
        peak_memory: highest resident set of the whole process in bytes, imports and mapped pages included.
        figures: further figures of the phase by name.
    """

    seconds: float
    processor_seconds: float
    read: int
    written: int
    device_read: int
    device_written: int
    peak_memory: int
    figures: dict[str, Any] = field(default_factory=dict)


def measured(work: Callable[[], Mapping[str, Any]]) -> Cost:
    """Do the work and say what it took."""
    before, busy = _input_output(), _processor_seconds()
    started = time.perf_counter()
    figures = work()
    seconds = time.perf_counter() - started
    after = _input_output()
    return Cost(
        seconds=seconds,
        processor_seconds=_processor_seconds() - busy,
        read=after["rchar"] - before["rchar"],
        written=after["wchar"] - before["wchar"],
        device_read=after["read_bytes"] - before["read_bytes"],
        device_written=after["write_bytes"] - before["write_bytes"],
        peak_memory=_peak_memory(),
        figures=dict(figures),
    )


def typical(costs: Sequence[Cost]) -> Cost:
    """The median of every figure of several runs of a phase; what is no number is the last run's."""
    last = costs[-1]
    numbers = {name: median(getattr(cost, name) for cost in costs) for name in asdict(last) if name != "figures"}
    figures = {
        name: median(cost.figures[name] for cost in costs) if isinstance(value, int | float) else value
        for name, value in last.figures.items()
    }
    return Cost(**numbers, figures=figures)


def _processor_seconds() -> float:
    """Of this process and of the children that it waited for."""
    return sum(os.times()[:4])


def _input_output() -> dict[str, int]:
    pairs = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {name: int(value) for name, value in pairs}


def _peak_memory() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def warm(paths: list[Path]) -> None:
    """Read files through once, so that what follows finds them in the page cache as far as they fit."""
    buffer = bytearray(8 * MIB)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def machine(directory: Path, threads: int) -> dict[str, str]:
    """The machine in words, as it is now."""
    memory = _fields(Path("/proc/meminfo"))
    from importlib.metadata import version

    return {
        "processor": _fields(Path("/proc/cpuinfo")).get("model name", platform.machine()),
        "cores": f"{os.cpu_count()}, of which torch uses {threads}",
        "memory": f"{_gib(memory['MemTotal'])} GiB, {_gib(memory['MemAvailable'])} GiB available at the start",
        "file system": _file_system(directory.resolve()),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "safetensors")},
    }


def _fields(path: Path) -> dict[str, str]:
    """The first value of every `name: value` line."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found


def _gib(kilobytes: str) -> str:
    return f"{int(kilobytes.split(maxsplit=1)[0]) / 2**20:.1f}"


def _file_system(directory: Path) -> str:
    mounts = [line.split()[:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(Path(point), kind) for _, point, kind in mounts if directory.is_relative_to(point)]
    return max(above, key=lambda mount: len(mount[0].parts))[1]

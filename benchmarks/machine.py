"""What the numbers were measured on."""

import datetime
import importlib.metadata
import os
import platform
import re
from typing import Any


def cpu() -> str:
    """Model name of the processor."""
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def describe() -> dict[str, Any]:
    """Hardware, date and versions, for a results file."""
    packages = ("prosparse", "llama-cpp-python", "torch", "transformers", "numpy")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    from prosparse import _core

    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "isa": _core.isa(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
    }


def file_label() -> str:
    """`<cpu>_<cores>c_<isa>_<yyyymm>`, for the name of a results file."""
    from prosparse import _core

    name = re.sub(r"[^a-z0-9]+", "-", cpu().lower()).strip("-")
    return f"{name}_{os.cpu_count()}c_{_core.isa()}_{datetime.date.today():%Y%m}"

"""The versions and the machine, in a few lines without names of hosts or users."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "transformers", "open_clip_torch", "webdataset")


def describe() -> list[str]:
    """One line of software, one of hardware."""
    versions = [f"Python {platform.python_version()}", *filter(None, map(_version, ("mm", *PACKAGES)))]
    return [", ".join(versions), ", ".join([*_accelerators(), _processor(), platform.system()])]


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _accelerators() -> list[str]:
    if not torch.cuda.is_available():
        return []
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [f"{names.count(name)} × {name}" for name in dict.fromkeys(names)]


def _processor() -> str:
    model = ""
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{os.cpu_count()} cores of {model or platform.machine()}"

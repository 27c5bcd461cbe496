"""What the numbers were measured on: versions, device, peak memory."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return versions, device and git revision as plain JSON values."""
    from .. import __version__

    versions = {"hf_sparse": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "versions": versions,
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "git_revision": git_revision(),
    }


def git_revision() -> str | None:
    """Return the commit of the current folder, with "+" where files differ from it; None outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", *arguments), capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


class PeakMemory:
    """The most memory held since it was made: GPU memory allocated by torch, else resident memory of the process.

    Linux lets a process reset its own high-water mark; elsewhere the figure is the peak since the process started, and
    `since` says "process" instead of "run".
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.since = device, "run"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.since = "process"

    def bytes(self) -> int | None:
        """Return the peak in bytes, None where this system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.since == "run":
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        try:
            import resource
        except ImportError:  # Windows
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

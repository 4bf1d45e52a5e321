"""What produced a number: commit, versions, hardware, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import faiss
import torch

from hashray import __version__


def environment() -> dict[str, Any]:
    """What produced a number: commit, versions, hardware, command; of absolute paths only the names."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": _commit(),
        "hashray": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": metadata.version("ray"),
        "faiss": faiss.__version__,
        "hardware": f"{os.cpu_count()} cores {platform.machine()}" + (f", {', '.join(gpus)}" if gpus else ""),
        "command": " ".join(
            [Path(sys.argv[0]).name, *(Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:])]
        ),
    }


def _commit() -> str | None:
    """The commit of the code that runs, "+changes" when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    return (head + ("+changes" if git("status", "--porcelain", "-uno") else "")) or None

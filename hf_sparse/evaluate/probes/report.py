"""A probe run on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..journal import IDENTITY
from ..output_folder import write_atomically
from .figures import as_json, probe_csv
from .plot import probe_pictures
from .result import ProbeResult
from .run import ROWS_FILE


def save_probes(result: ProbeResult, folder: str | os.PathLike[str], *, pictures: bool = False) -> list[Path]:
    """Write probe.json (every figure), probe.csv (the same, long) and probe_samples.jsonl; return the paths.

    Each file appears whole or not at all; one of the same name is replaced.

    Args:
        pictures: also a PNG per probe.
    Raises:
        ValueError: `pictures` without matplotlib.
    """
    folder = Path(folder)
    figures = as_json(result)
    files = {
        IDENTITY: _text(result.identity),
        f"{ROWS_FILE}.jsonl": "".join(json.dumps(row) + "\n" for row in result.rows).encode(),
        **(probe_pictures(figures) if pictures else {}),
        "probe.csv": probe_csv(figures).encode(),
        "probe.json": _text(figures),  # last: where it is, all is
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in reversed(files)]


def _text(content: object) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()

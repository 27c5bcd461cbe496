"""Run notebooks from top to bottom and write them with what they gave.

    python notebooks/execute.py [--output DIR] FILE ...

Each gets a kernel of its own with this very Python, in the notebook's folder, offline, and without the settings that a
person may have for Jupyter and IPython. Without --output the files are replaced. An error in a cell ends with the cell
and its traceback, exit status 1, and the file as it was.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SECONDS = 280  # a cell that takes longer hangs
KERNEL = ("-m", "ipykernel_launcher", "--log-level=ERROR", "--InteractiveShell.colors=nocolor")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write there instead")
    args = parser.parse_args()
    with environment():
        from nbclient.exceptions import CellExecutionError

        for file in args.files:
            try:
                text = executed(file)
            except CellExecutionError as error:
                print(f"{file}: {error}", file=sys.stderr)
                return 1
            write(file if args.output is None else args.output / file.name, text)
    return 0


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """Let the kernels start the same on every machine."""
    import matplotlib.font_manager  # noqa: F401  # lists the fonts, if none did before: nothing a notebook should tell

    os.environ.pop("MPLBACKEND", None)  # pictures go into the notebook
    with tempfile.TemporaryDirectory() as folder:
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
            os.environ[name] = str(Path(folder, name.lower()))
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["PYTHONWARNINGS"] = (
            "ignore:IProgress not found"  # tqdm misses ipywidgets, and no bar is shown
        )
        yield


def executed(file: Path) -> str:
    """Return the notebook with its outputs, and without what differs between machines for no reason."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class ThisPython(AsyncKernelManager):
        kernel_spec = KernelSpec(
            argv=[sys.executable, *KERNEL, "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
        )

    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_manager_class=ThisPython,
        timeout=SECONDS,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(file.parent)}},
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}
    return nbformat.writes(notebook) + "\n"


def write(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())

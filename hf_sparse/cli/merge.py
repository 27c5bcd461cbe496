"""hf-sparse merge: a whole model out of an adapter and its base, which keeps the pattern."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings

from .models import DTYPES
from .spelling import check_stored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="adapter folder with its pattern (it knows its base)"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder of the model; it appears whole or not at all"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the weights, in which they are merged too (default: as those of the base were saved)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model that is in DIR")


def run(args: argparse.Namespace) -> None:
    import transformers

    from ..hf import attention_name, read_sidecar
    from ..hf.pattern_file import read_stored
    from ..hf.sources import SIDECAR
    from ..train.export import merge

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sidecar = os.path.join(args.adapter, SIDECAR)
    if os.path.exists(sidecar):
        check_stored(read_stored(sidecar), sidecar)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
            folder = merge(args.adapter, args.output, dtype=args.dtype, overwrite=args.overwrite)
    except ValueError as error:
        raise ValueError(
            str(error).replace("say that it may be overwritten", "replace it with --overwrite")
        ) from None
    saved = read_sidecar(args.adapter)
    plugins = "".join(f" --plugin {shlex.quote(file)}" for file in args.plugin)
    print(f"model     {folder}")
    print(f"pattern   {saved.pattern}")
    print(f"load      hf_sparse.load({os.fspath(folder)!r}), or from_pretrained with")
    print(f"          attn_implementation={attention_name(saved.pattern)!r} after import hf_sparse")
    print(f"next: hf-sparse eval {shlex.quote(os.fspath(folder))}{plugins}", file=sys.stderr)

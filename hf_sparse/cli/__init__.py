"""The command line: hf-sparse eval, patterns, show."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

# Each command is a module with add_arguments(parser) and run(args), imported when it is asked for.
COMMANDS = {
    "eval": ("eval", "measure the perplexity of a model, dense and with sparse patterns, on the same tokens"),
    "patterns": ("pictures", "list the patterns with their options"),
    "show": ("pictures", "draw what a pattern lets each token see"),
}


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a ValueError, so that every mistake ends the same way."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].lower()}{message[1:]}; see: {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 after a mistake (one sentence on stderr), 130 on Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        parsed = _parser(arguments).parse_args(arguments)
        importlib.import_module(f".{COMMANDS[parsed.command][0]}", __name__).run(parsed)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("hf-sparse: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hf-sparse patterns | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__)
    except RuntimeError as error:  # PyTorch's way to say that memory is out, on CUDA and CPU
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return _fail("out of memory; use a smaller --length, --dtype bfloat16, or a smaller model.")
    return 0


def _fail(message: str) -> int:
    print(f"hf-sparse: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parser(arguments: Sequence[str]) -> Parser:
    parser = Parser(
        prog="hf-sparse", description="Sparse attention patterns for Hugging Face models.", allow_abbrev=False
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        command.allow_abbrev = False
        if name in arguments:  # the others stay unread: their options may need slow imports
            importlib.import_module(f".{module}", __name__).add_arguments(name, command)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from .. import __version__

        print(f"hf-sparse {__version__}")
        parser.exit()

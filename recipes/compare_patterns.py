"""What does each pattern cost, and what does it save? Every pattern against dense attention, at several lengths.

    python recipes/compare_patterns.py [--lengths 4096,8192,16384] [--documents 10,8,5] [--output docs/comparison]

For each length, on the model in --model and, for a single attention call, on random tensors:

- quality: perplexity of held-out documents of at least that length, each read in one pass, dense and under each pattern
  on the same tokens, with paired intervals. Beyond the length that the model was trained on this is extrapolation, and
  marked as such;
- the whole model: tokens/s of reading one prompt, the memory that takes, and the bytes of the cache after it;
- the operator: one attention call, 8 heads x 64, float32: forward, forward + backward, and the peak memory of both.

What is compared takes turns in one process. Every part is kept in --work as it comes, and the same command goes on
where it was stopped. OUTPUT gets report.html, comparison.json (every figure), comparison.csv and the pictures;
--report-only makes all of them again from OUTPUT/comparison.json.
"""

import argparse
import json
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the benchmarks are no part of what is installed

import numpy as np
import torch
from compare_patterns_cases import CHOICES, find_choices
from compare_patterns_parts import PARTS, Comparison, begin, keep
from compare_patterns_report import FORMAT, save_report
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from benchmarks.results import checksum, machine
from benchmarks.timing import Deadline, Failure, OutOfTime, attempt
from hf_sparse.documents import fingerprint, read_documents, standard_library
from hf_sparse.evaluate.machine import git_revision
from hf_sparse.evaluate.output_folder import check_output_folder
from hf_sparse.evaluate.plot import check_plot
from hf_sparse.evaluate.variants import weights_fingerprint
from hf_sparse.patterns import pattern_to_json

ROOT = Path(__file__).resolve().parent
RECORD = "comparison.json"


def main() -> int:
    args = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        check_plot()
        check_output_folder("--output", args.output)
        if args.report_only:
            written = save_report(_read_record(args.output / RECORD), args.output)
            print(f"written: {', '.join(map(str, written))}")
            return 0
        comparison = prepare(args)
        settings = _settings(args, comparison)
        begin(args.work, settings)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    not_measured = measure_all(comparison)
    record = {
        "format": FORMAT,
        "command": shlex.join(("python", *sys.argv)),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "git_revision": git_revision(),
        "settings": settings,
        "not_measured": not_measured,
        "lengths": {str(n): {part: comparison.done(part, n) for part in PARTS} for n in comparison.documents},
    }
    keep(args.output / RECORD, record)
    written = save_report(record, args.output)
    print(f"written: {', '.join(map(str, (args.output / RECORD, *written)))}")
    for line in not_measured:
        print(f"not measured: {line}", file=sys.stderr)
    return int(bool(not_measured))


def measure_all(comparison: Comparison) -> list[str]:
    """Measure every part that is not known yet, and return what could not be measured, with the reason."""
    parts = [(part, n) for n in comparison.documents for part in PARTS if not comparison.is_done(part, n)]
    expected = {
        (part, n): PARTS[part] * (len(comparison.choices) + 4) * n / 8192 for part, n in parts
    }  # dense attention costs several patterns
    spent = accounted = 0.0
    failures = []
    for number, (part, n) in enumerate(parts, 1):
        pace = spent / accounted if accounted else 1.0
        left = pace * sum(expected[each] for each in parts[number - 1 :]) / 60
        print(f"{number}/{len(parts)}  {part} at {n:,} tokens; about {left:.0f} minutes left", flush=True)
        start = time.monotonic()
        try:
            failed = attempt(partial(comparison.measure, part, n))
        except OutOfTime as error:
            failed = Failure(str(error))
        except KeyboardInterrupt:
            return [*failures, *(f"{each} at {n:,} tokens: interrupted" for each, n in parts[number - 1 :])]
        if isinstance(failed, Failure):
            failures.append(f"{part} at {n:,} tokens: {failed.reason}")
        spent, accounted = spent + time.monotonic() - start, accounted + expected[part, n]
    return failures


def prepare(args: argparse.Namespace) -> Comparison:
    """Return what is to be measured.

    Raises:
        ValueError: an unknown pattern, a length that the model or no document has, or texts that cannot be read.
        OSError: no such model.
    """
    choices = find_choices(args.patterns)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    load = partial(AutoModelForCausalLM.from_pretrained, args.model, dtype=torch.float32)
    model = timed = load()
    trained = getattr(model.config, "max_position_embeddings", None)
    if trained and max(args.lengths) > trained:
        if getattr(model.config, "rope_parameters", None) is None:
            raise ValueError(
                f"--lengths {max(args.lengths)} is beyond the {trained} positions of this model; use {trained} or less."
            )
        timed = load(max_position_embeddings=max(args.lengths))
    texts = read_documents(args.text) if args.text else standard_library("test")
    found = tokenizer([text.text for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    sizes = [len(ids) + 1 for ids in found]  # with the prefix
    documents = {}
    for length, most in zip(args.lengths, args.documents, strict=True):
        reach = [text for text, size in zip(texts, sizes, strict=True) if size >= length]
        if not reach:
            raise ValueError(
                f"no document has {length:,} tokens, the longest has {max(sizes):,}; name longer texts with --text, "
                "or shorter --lengths."
            )
        spread = np.linspace(0, len(reach) - 1, min(most, len(reach))).round().astype(int)
        documents[length] = [reach[i] for i in spread]
    deadline = Deadline.after(args.minutes)
    return Comparison(choices, documents, tokenizer, model, timed, args.repeats, args.work, deadline)


def _settings(args: argparse.Namespace, comparison: Comparison) -> dict[str, Any]:
    """Return all that every part of one comparison has in common."""
    config = comparison.model.config
    return {
        "model": Path(args.model).name,
        "trained_length": getattr(config, "max_position_embeddings", None),
        "layers": config.num_hidden_layers,
        "weights": weights_fingerprint(comparison.model),
        "documents": {str(n): [d.name for d in texts] for n, texts in comparison.documents.items()},
        "texts": {str(n): fingerprint(texts) for n, texts in comparison.documents.items()},
        "patterns": {choice.label: pattern_to_json(choice.pattern) for choice in comparison.choices},
        "titles": {choice.label: str(choice.pattern) for choice in comparison.choices},
        "repeats": args.repeats,
        "code": checksum(),
        "machine": machine(torch.device("cpu")),
    }


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); measure again.") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by this version of the recipe; measure again.")
    return record


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=os.path.relpath(ROOT / "tiny_base"), help="folder or hub id")
    parser.add_argument(
        "--lengths", type=_numbers, default=[4096, 8192, 16384], help="tokens, comma-separated"
    )
    parser.add_argument(
        "--documents", type=_numbers, default=[10, 8, 5], help="the most documents at each length"
    )
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="held-out texts, not the standard library's"
    )
    parser.add_argument(
        "--patterns", help=f"comma-separated, of: {', '.join(choice.label for choice in CHOICES)}"
    )
    parser.add_argument("--repeats", type=int, default=2, help="rounds of a prompt; operators get one more")
    parser.add_argument("--minutes", type=float, help="begin no part after this time")
    parser.add_argument("--output", type=Path, default=Path("docs/comparison"), help="folder of the report")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/comparison"), help="folder of what is measured"
    )
    parser.add_argument("--report-only", action="store_true", help="make the report again, measure nothing")
    args = parser.parse_args()
    args.lengths = sorted(set(args.lengths))
    args.documents = args.documents * len(args.lengths) if len(args.documents) == 1 else args.documents
    if len(args.documents) != len(args.lengths):
        parser.error(f"--documents takes one number, or one for each of the {len(args.lengths)} lengths")
    if args.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {args.repeats}")
    return args


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"whole numbers >= 1 are wanted, such as 4096,8192; got {text!r}")
    return [int(word) for word in words]


if __name__ == "__main__":
    sys.exit(main())

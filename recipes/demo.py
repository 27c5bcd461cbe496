"""The whole way on one page: patch, measure, adapt, measure again. `make demo` runs it.

    python recipes/demo.py [--model FOLDER_OR_HUB_ID] [--text FILE ...] [--output demo] [--steps 60] [--documents 25]

1. Perplexity of held-out documents, dense and under each pattern, nothing trained.
2. LoRA for the first pattern, and the same LoRA (data, steps, seed) for dense attention, the control: what it wins is
   what the data teaches, so only the rest counts as recovery.
3. Speed and memory of reading a prompt of 4,096 and of 8,192 tokens.

Prints the table, and writes it with everything that the evaluation harness makes of the figures into OUTPUT: table.md,
results.json, CSV files, pictures, and report.html, which holds all of them.
"""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from demo_report import Report
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

import hf_sparse
from hf_sparse import Longformer, Pattern, SlidingWindow, StreamingLLM, Strided
from hf_sparse.documents import Document, read_documents, standard_library
from hf_sparse.evaluate import perplexity, save_results
from hf_sparse.evaluate.csv_files import as_csv
from hf_sparse.evaluate.output_folder import check_output_folder, write_atomically
from hf_sparse.evaluate.plot import check_plot
from hf_sparse.evaluate.speed import measure_prefill
from hf_sparse.train import AdaptationArguments, SparseTrainingArguments, prepare, run

# About 128 keys per query each, so that their rows can be compared.
PATTERNS: tuple[Pattern, ...] = (
    SlidingWindow(128),
    StreamingLLM(sinks=4, window=124),
    Longformer(window=124, global_tokens=(0, 1, 2, 3)),
    Strided(16),
    SlidingWindow(64) | Strided(16),
)
LENGTH = 2048  # tokens, in training and in evaluation
PROMPTS = (4096, 8192)  # tokens
ROOT = Path(__file__).resolve().parent


def main() -> int:
    args = parse()
    start = time.monotonic()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        output = Path(args.output)
        check_output_folder("--output", output)
        check_plot()
        documents = held_out(args)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2

    def measure(adapted, patterns, control=None):
        return perplexity(
            adapted,
            tokenizer,
            documents,
            max_length=LENGTH,
            patterns=patterns,
            control=control,
            progress=True,
        )

    say(f"1/4  perplexity of {len(documents)} held-out documents, dense and under {len(PATTERNS)} patterns")
    untrained = measure(model, PATTERNS)

    say(f"2/4  LoRA for {PATTERNS[0]}, {args.steps} steps, then the same LoRA for dense attention")
    adapter = adapt(args, output / PATTERNS[0].name, dense_control=False)
    control = adapt(args, output / "dense_control", dense_control=True)

    say("3/4  perplexity with the adapters")
    adapted_model = hf_sparse.load(adapter, dtype=torch.float32)
    adapted_model.load_adapter(str(control), "control")
    adapted = measure(adapted_model, PATTERNS[:1], "control")

    longest = getattr(model.config, "max_position_embeddings", None) or max(PROMPTS)
    prompts = [n for n in PROMPTS if n <= longest] or [longest]
    say(f"4/4  reading prompts of {' and '.join(f'{n:,}' for n in prompts)} tokens")
    prefills = measure_prefill(model, (None, *PATTERNS), prompts, repeats=2, progress=True)

    report = Report(untrained, adapted, prefills, args.steps, time.monotonic() - start)
    written = save_results(
        report.result,
        output,
        pictures=True,
        html=True,
        command=shlex.join(("python", *sys.argv)),
        sections=[report.section()],
    )
    write_atomically(output / "table.md", report.table().encode())
    write_atomically(output / "prompts.csv", as_csv(report.speeds()).encode())
    names = ("table.md", "prompts.csv", *(path.name for path in written))
    print(f"\n{report.table()}\nwritten: {output}/{', '.join(names)}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "tiny_base"), help="folder or hub id")
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="held-out texts; default: the standard library's"
    )
    parser.add_argument("--train-text", nargs="+", metavar="FILE", help="texts to adapt on; default likewise")
    parser.add_argument("--output", default="demo", help="folder for the results")
    parser.add_argument("--steps", type=int, default=60, help="training steps of 4,096 tokens, twice")
    parser.add_argument("--documents", type=int, default=25, help="held-out documents measured")
    args = parser.parse_args()
    for name in ("steps", "documents"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(args, name)}")
    return args


def held_out(args: argparse.Namespace) -> list[Document]:
    """Return the texts that are measured: of the test split, the first that fill the evaluated length."""
    if args.text:
        return read_documents(args.text)[: args.documents]
    documents = [
        d for d in standard_library("test") if len(d.text) > 5 * LENGTH
    ]  # a token is 3 to 4 characters
    return documents[: args.documents]


def adapt(args: argparse.Namespace, folder: Path, *, dense_control: bool) -> Path:
    """Train LoRA on the training split and return the adapter's folder."""
    arguments = AdaptationArguments(
        model=args.model,
        pattern=PATTERNS[0].name,
        pattern_options=PATTERNS[0].options(),
        length=LENGTH,
        text=args.train_text,
        dense_control=dense_control,
    )
    training = SparseTrainingArguments(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(5, args.steps),
        bf16=True,
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        seed=0,
    )
    return run(prepare(arguments, training))


def say(line: str) -> None:
    print(f"\n{line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""An endless dialogue in constant memory: one cache over all turns, of which only the sinks and a window are kept.

    python recipes/streaming_chat.py [--model FOLDER_OR_HUB_ID] [--turns TEXT TEXT ...]

Every turn reads only its own new tokens; after each the size of the cache is printed, which stays the same once the
window is full. The default model is no chat model: it goes on with Python code. To talk with a model of your own, in
its chat template, use ``hf-sparse generate MODEL --pattern streaming_llm``.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, logging

import hf_sparse

TURNS = (
    "class Stack:\n    def __init__(self):\n",
    "    def push(self, item):\n",
    "    def pop(self):\n",
    "def test_stack():\n",
    "if __name__ == '__main__':\n",
)


def main() -> int:
    args = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    hf_sparse.patch_model(model, "streaming_llm", sinks=args.sinks, window=args.window, positions="cache")
    cache = hf_sparse.make_cache(model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    dialogue = torch.tensor(
        [[] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]], dtype=torch.long
    )
    for turn in args.turns:
        print(turn, end="", flush=True)
        new = tokenizer(turn, add_special_tokens=False, return_tensors="pt")["input_ids"]
        dialogue = torch.cat((dialogue, new), 1)
        # The whole dialogue goes in; generate reads what the cache has not seen.
        dialogue = model.generate(
            dialogue,
            attention_mask=torch.ones_like(dialogue),
            past_key_values=cache,
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            streamer=streamer,
        )
        print(
            f"[{cache.get_seq_length():,} tokens seen, {cache.kept:,} kept in {cache.nbytes / 2**20:.2f} MiB]\n"
        )
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(Path(__file__).parent / "tiny_base"), help="folder or hub id")
    parser.add_argument("--turns", nargs="+", default=TURNS, metavar="TEXT", help="what is said, in order")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens that are kept for good")
    parser.add_argument("--window", type=int, default=124, help="newest tokens that are kept")
    parser.add_argument("--max-new-tokens", type=int, default=120, help="most tokens of an answer")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

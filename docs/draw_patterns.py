"""Draw docs/patterns.png, the masks of the catalogue side by side:  python docs/draw_patterns.py"""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

import hf_sparse
from hf_sparse.evaluate.output_folder import write_atomically

TOKENS, HEADS, COLUMNS = 64, 6, 6
# Title, pattern, and the query head that is drawn.
PANELS = [
    ("sliding_window", hf_sparse.SlidingWindow(12), 0),
    ("dilated_window", hf_sparse.get_pattern("dilated_window", window=8, dilation=3), 0),
    ("multi_scale", hf_sparse.get_pattern("multi_scale", window=4, scales=4), 0),
    ("block_local", hf_sparse.get_pattern("block_local", block=8), 0),
    ("shifted, first heads", hf_sparse.get_pattern("shifted", group=16), 0),
    ("shifted, last heads", hf_sparse.get_pattern("shifted", group=16), 5),
    ("strided, atrous", hf_sparse.Strided(8), 0),
    ("strided, absolute", hf_sparse.Strided(8, anchor="absolute"), 0),
    ("sparse_transformer_strided", hf_sparse.get_pattern("sparse_transformer_strided", stride=8), 0),
    ("sparse_transformer_fixed", hf_sparse.get_pattern("sparse_transformer_fixed", block=12, summary=2), 0),
    ("global_tokens, ratio=0.1", hf_sparse.get_pattern("global_tokens", ratio=0.1), 0),
    ("random", hf_sparse.get_pattern("random", keys_per_query=6), 0),
    ("streaming_llm", hf_sparse.StreamingLLM(sinks=4, window=12), 0),
    ("longformer", hf_sparse.Longformer(window=10, global_tokens=(0, 20, 21, 40)), 0),
    ("bigbird", hf_sparse.get_pattern("bigbird", block=2), 0),
    ("grouped_heads, local", hf_sparse.get_pattern("grouped_heads", window=12, adaptive_window=False), 0),
    ("grouped_heads, global", hf_sparse.get_pattern("grouped_heads", window=12, adaptive_window=False), 5),
    ("sliding_window | strided", hf_sparse.SlidingWindow(6) | hf_sparse.Strided(13), 0),
]


def main() -> None:
    rows = -(-len(PANELS) // COLUMNS)
    figure = Figure(figsize=(2.1 * COLUMNS, 2.6 * rows), dpi=110, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, COLUMNS)
    colours = ListedColormap(["white", "#e9edf1", "#0072b2"])
    for axes, (title, pattern, head) in zip(grid.flat, PANELS, strict=True):
        allowed = pattern.mask(TOKENS, heads=HEADS)[head]
        past = allowed.new_ones(allowed.shape).tril()
        axes.imshow(
            past.int() + (allowed & past).int(), cmap=colours, vmin=0, vmax=2, interpolation="nearest"
        )
        density = int(allowed.sum()) / int(past.sum())
        axes.set_title(title, fontsize=8.5)
        axes.set_xlabel(f"{density:.0%} of the pairs", fontsize=8)
        axes.set(xticks=[], yticks=[])
    figure.suptitle(
        f"What each of {TOKENS} tokens sees in a causal model (rows are queries, columns keys)", fontsize=11
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(Path(__file__).with_name("patterns.png"), picture.getvalue())


if __name__ == "__main__":
    main()

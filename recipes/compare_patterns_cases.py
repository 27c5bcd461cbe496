"""The patterns that `compare_patterns.py` compares: every one for use alone, at about as many keys per query.

At 8,192 tokens each sees some 250 to 500 keys on average, so that rows can be compared; the exceptions are windows of
other sizes, which show what more or fewer keys are worth, and `layered`, two of whose layers in six are dense.
"""

from dataclasses import dataclass

from benchmarks.cases import Case
from hf_sparse import Pattern, get_pattern

# A window alone forgets, a stride alone sees no neighbours: what both see together.
UNION = get_pattern("sliding_window", window=256) | get_pattern("strided", stride=16)
EQUAL_TO_DENSE = "full"  # registered too; it is what the others are held against
PART_OF_UNIONS = "sinks"  # registered too; `streaming_llm` is its union with a window


@dataclass(frozen=True)
class Choice:
    """A pattern with the short name that tables and pictures call it by."""

    label: str
    pattern: Pattern

    @property
    def is_one_operator(self) -> bool:
        """False where layers differ or a far key is scored elsewhere: a single attention call does not tell."""
        return self.pattern.name not in ("layered", "rerope", "self_extend")

    @property
    def case(self) -> Case:
        """The pattern as the benchmarks take it."""
        return _Held(self.label, self.pattern.name, held=self.pattern)


@dataclass(frozen=True)
class _Held(Case):
    held: Pattern | None = None  # a union has no name to be made from

    def pattern(self, length: int) -> Pattern:
        assert self.held is not None
        return self.held.resolve(length)


def _choice(label: str, name: str, **options: object) -> Choice:
    return Choice(label, get_pattern(name, **options))


CHOICES = (
    _choice("window-128", "sliding_window", window=128),
    _choice("window-512", "sliding_window", window=512),
    _choice("window-2048", "sliding_window", window=2048),
    _choice("streaming-4+508", "streaming_llm", sinks=4, window=508),
    _choice("streaming-4+2044", "streaming_llm", sinks=4, window=2044),
    _choice("longformer-448+64", "longformer", window=448, global_tokens=tuple(range(64))),
    _choice("dilated-512x2", "dilated_window", window=512, dilation=2),
    _choice("multi-scale-192x4", "multi_scale", window=192, scales=4),
    _choice("block-256+1", "block_local", block=256, neighbours=1),
    _choice("shifted-1024", "shifted", group=1024),
    _choice("bigbird-64", "bigbird", block=64),
    _choice("random-8x64", "random", blocks=8, block=64),
    _choice("global-256", "global_tokens", positions=tuple(range(256))),
    _choice("strided-16", "strided", stride=16, anchor="absolute"),
    _choice("atrous-16", "atrous", stride=16),
    _choice("atrous-local-16", "atrous_local", stride=16),
    _choice("sparse-strided-256", "sparse_transformer_strided", stride=256),
    _choice("sparse-fixed-128/8", "sparse_transformer_fixed", block=128, summary=8),
    _choice(
        "grouped-512+1/16", "grouped_heads", window=512, global_token_ratio=1 / 16, adaptive_window=False
    ),
    Choice("window-256|strided-16", UNION),
    _choice(
        "layered-512+dense/3", "layered", pattern=get_pattern("sliding_window", window=512), dense_every=3
    ),
    _choice("rerope-1024 union", "rerope", window=1024, pattern=UNION),
    _choice("self-extend-8 union", "self_extend", group=8, window=1024, pattern=UNION),
)


def find_choices(labels: str | None) -> tuple[Choice, ...]:
    """Return the choices of these labels, comma-separated; None is all of them.

    Raises:
        ValueError: a label that none of them has.
    """
    known = {choice.label: choice for choice in CHOICES}
    if labels is None:
        return CHOICES
    wanted = [label.strip() for label in labels.split(",")]
    if unknown := [label for label in wanted if label not in known]:
        raise ValueError(f"there is no pattern {unknown[0]!r} here; choose from: {', '.join(known)}")
    return tuple(known[label] for label in dict.fromkeys(wanted))

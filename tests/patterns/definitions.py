"""The written definition of every pattern once more, as plain Python on numbers, and random patterns to compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from hf_sparse import Pattern, PerHead, PerLayer, Union
from hf_sparse.patterns import pattern_class
from hf_sparse.patterns.base import Context

HEADS, LAYERS = 3, 2


@dataclass(frozen=True)
class Call:
    causal: bool = True
    heads: int = HEADS
    layer: int = 0
    length: int = 13
    chosen: tuple[int, ...] = ()

    @property
    def context(self) -> Context:
        return Context(self.causal, self.layer, self.heads, None if self.causal else self.length, self.chosen)


def defined_mask(pattern: Pattern, call: Call) -> torch.Tensor:
    """Return the mask [H, n, n] that the definition gives, pair by pair."""
    n = range(call.length)
    return torch.tensor(
        [
            [
                [(k <= q or not call.causal) and (q == k or allows(pattern, call, h, q, k)) for k in n]
                for q in n
            ]
            for h in range(call.heads)
        ]
    )


def allows(pattern: Pattern, call: Call, h: int, q: int, k: int) -> bool:
    if isinstance(pattern, Union):
        return any(allows(member, call, h, q, k) for member in pattern.members)
    if isinstance(pattern, PerHead):
        return allows(pattern.patterns[h], call, h, q, k)
    if isinstance(pattern, PerLayer):
        return allows(pattern.patterns[call.layer], call, h, q, k)
    return DEFINITIONS[pattern.name](pattern, call, h, q, k)


def one_of(option, index):
    return option[index] if isinstance(option, tuple) else option


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def drawn(seed, layer, head, block, candidates, most):
    """Return the blocks drawn from `candidates`, an ascending list."""
    state = mix(mix(mix(mix(seed) ^ layer) ^ head) ^ block)
    picks = []
    for i in range(fewest := min(most, len(candidates))):
        end = len(candidates) - fewest + i
        pick = (mix((state + i) % 2**64) >> 1) % (end + 1)
        picks.append(end if pick in picks else pick)
    return [candidates[pick] for pick in picks]


def random(p, call, h, q, k):
    size, most = (1, p.keys_per_query) if p.blocks is None else (p.block, p.blocks)
    end = q // size if call.causal else (call.length - 1) // size
    return k // size in drawn(p.seed, call.layer, h, q // size, list(range(end + 1)), most)


def bigbird(p, call, h, q, k):
    own, seen, blocks = q // p.block, k // p.block, -(-call.length // p.block)
    if call.causal:
        near = set(range(own - p.window_blocks + 1, own + 1))
        ends = set(range(p.global_blocks))
        rest = sorted(set(range(own + 1)) - near - ends)
    else:
        half = (p.window_blocks - 1) // 2
        near = set(range(own - half, own + half + 1))
        first, last = (p.global_blocks + 1) // 2, p.global_blocks // 2
        ends = {*range(first), *range(blocks - last, blocks)}
        rest = sorted(set(range(blocks)) - near - ends)
        if own in ends:
            return True
    return seen in near or seen in ends or seen in drawn(p.seed, call.layer, h, own, rest, p.random_blocks)


def global_tokens(p, call, h, q, k):
    def chosen(position):
        every = p.ratio is not None and position % round(1 / p.ratio) == 0
        return position in p.positions or position in call.chosen or every

    return chosen(k) or ((p.global_queries or not call.causal) and chosen(q))


def dilated(q, k, window, dilation):
    return abs(q - k) < window * dilation and (q - k) % dilation == 0


def longformer(p, call, h, q, k):
    chosen = {*p.global_tokens, *call.chosen}
    near = dilated(q, k, one_of(p.window, call.layer), one_of(p.dilation, h))
    return near or k in chosen or (q in chosen and not call.causal)


def split(p, call, h, first, second):
    """Merged heads see what either part allows; split, the first half sees the first part and the rest the second."""
    return (first or second) if p.heads == "merged" else (first if h < call.heads // 2 else second)


def grouped_heads(p, call, h, q, k):
    local = p.local_heads
    if local is None:
        local = round(2 * call.heads / 3) if p.global_heads is None else call.heads - p.global_heads
    return abs(q - k) < p.window if h < local else k % round(1 / p.global_token_ratio) == 0


def layered(p, call, h, q, k):
    if p.layers is None:
        return call.layer % p.dense_every == p.dense_every - 1 or allows(p.pattern, call, h, q, k)
    ranges = [pattern for first, stop, pattern in p.layers if first <= call.layer < stop]
    return not ranges or allows(ranges[0], call, h, q, k)


def shifted(p, call, h, q, k):
    shift = 0 if h < call.heads // 2 else p.group // 2
    return (q + shift) // p.group == (k + shift) // p.group


DEFINITIONS = {
    "full": lambda p, call, h, q, k: True,
    "sliding_window": lambda p, call, h, q, k: abs(q - k) < p.window,
    "dilated_window": lambda p, call, h, q, k: dilated(q, k, p.window, one_of(p.dilation, h)),
    "strided": lambda p, call, h, q, k: (q * (p.anchor == "relative") - k) % p.stride == 0,
    "block_local": lambda p, call, h, q, k: abs(q // p.block - k // p.block) <= p.neighbours,
    "global_tokens": global_tokens,
    "random": random,
    "atrous": lambda p, call, h, q, k: (q - k) % p.stride == 0,
    "atrous_local": lambda p, call, h, q, k: abs(q - k) < p.stride or (q - k) % p.stride == 0,
    "sparse_transformer_strided": lambda p, call, h, q, k: split(
        p, call, h, abs(q - k) < p.stride, (q - k) % p.stride == 0
    ),
    "sparse_transformer_fixed": lambda p, call, h, q, k: split(
        p, call, h, q // p.block == k // p.block, k % p.block >= p.block - p.summary
    ),
    "longformer": longformer,
    "bigbird": bigbird,
    "sinks": lambda p, call, h, q, k: k < p.sinks,
    "streaming_llm": lambda p, call, h, q, k: k < p.sinks or abs(q - k) < p.window,
    "grouped_heads": grouped_heads,
    "multi_scale": lambda p, call, h, q, k: any(dilated(q, k, p.window, 2**i) for i in range(p.scales)),
    "layered": layered,
    "shifted": shifted,
    "rerope": lambda p, call, h, q, k: allows(p.pattern, call, h, q, k),
    "self_extend": lambda p, call, h, q, k: allows(p.pattern, call, h, q, k),
}


def count(least=1, most=8):
    return st.integers(least, most)


def listed(size):
    return st.one_of(count(1, 5), st.lists(count(1, 5), min_size=size, max_size=size))


POSITIONS = st.lists(count(0, 14), max_size=4)
RATIO = st.sampled_from([1.0, 0.7, 0.5, 0.3, 0.01])
SPLIT = st.sampled_from(["merged", "split"])
RANDOM_BLOCKS = {"blocks": count(1, 4), "block": count(1, 5), "seed": count(0, 9)}
OPTIONS = {
    "full": st.just({}),
    "sliding_window": st.fixed_dictionaries({"window": count()}),
    "dilated_window": st.fixed_dictionaries({"window": count(), "dilation": listed(HEADS)}),
    "strided": st.fixed_dictionaries(
        {"stride": count(), "anchor": st.sampled_from(["relative", "absolute"])}
    ),
    "block_local": st.fixed_dictionaries({"block": count(), "neighbours": count(0, 3)}),
    "global_tokens": st.fixed_dictionaries(
        {
            "positions": POSITIONS,
            "token_ids": POSITIONS,
            "ratio": st.one_of(st.none(), RATIO),
            "global_queries": st.booleans(),
        }
    ),
    "random": st.one_of(
        st.fixed_dictionaries({"keys_per_query": count(), "seed": count(0, 9)}),
        st.fixed_dictionaries(RANDOM_BLOCKS),
    ),
    "atrous": st.fixed_dictionaries({"stride": count()}),
    "atrous_local": st.fixed_dictionaries({"stride": count()}),
    "sparse_transformer_strided": st.fixed_dictionaries({"stride": count(), "heads": SPLIT}),
    "sparse_transformer_fixed": st.integers(1, 8).flatmap(
        lambda block: st.fixed_dictionaries(
            {"block": st.just(block), "summary": count(1, block), "heads": SPLIT}
        )
    ),
    "longformer": st.fixed_dictionaries(
        {
            "window": listed(LAYERS),
            "global_tokens": POSITIONS,
            "dilation": listed(HEADS),
            "global_projections": st.booleans(),
        }
    ),
    "bigbird": st.fixed_dictionaries(
        {
            "block": count(1, 4),
            "window_blocks": st.sampled_from([1, 3, 5]),
            "global_blocks": count(0, 5),
            "random_blocks": count(0, 4),
            "seed": count(0, 9),
        }
    ),
    "sinks": st.fixed_dictionaries({"sinks": count(1, 4)}),
    "streaming_llm": st.fixed_dictionaries(
        {"sinks": count(0, 4), "window": count(), "positions": st.sampled_from(["absolute", "cache"])}
    ),
    "grouped_heads": st.fixed_dictionaries(
        {"window": count(), "global_token_ratio": RATIO, "min_window": count(1, 3)},
        optional={
            "local_heads": count(0, HEADS),
            "adaptive_window": st.booleans(),
            "max_window": count(3, 9),
        },
    ),
    "multi_scale": st.fixed_dictionaries({"window": count(1, 4), "scales": count(1, 4)}),
    "layered": st.one_of(
        st.fixed_dictionaries({"pattern": st.deferred(lambda: LEAVES), "dense_every": count(2, 4)}),
        st.fixed_dictionaries(
            {"layers": st.dictionaries(count(0, LAYERS - 1), st.deferred(lambda: LEAVES), min_size=1)}
        ),
    ),
    "shifted": st.fixed_dictionaries({"group": st.sampled_from([2, 4, 6])}),
    "rerope": st.fixed_dictionaries({"window": count(), "pattern": st.deferred(lambda: UNPLACED)}),
    "self_extend": st.fixed_dictionaries(
        {"group": count(), "window": count(), "pattern": st.deferred(lambda: UNPLACED)}
    ),
}


def named(name):
    """Any pattern of that name for HEADS heads and LAYERS layers."""
    return OPTIONS[name].map(lambda options: pattern_class(name)(**options))


WRAPPERS = ("layered", "rerope", "self_extend")
# Any pattern that is not made of others and leaves all pairs their distances: such ones go with one another.
LEAVES = (
    st.sampled_from([name for name in sorted(OPTIONS) if name not in WRAPPERS])
    .flatmap(named)
    .filter(lambda pattern: pattern.places(None) is None)
)


def _composed(members):
    return st.one_of(
        st.lists(members, min_size=1, max_size=3).map(lambda patterns: Union.of(*patterns)),
        st.lists(members, min_size=HEADS, max_size=HEADS).map(PerHead),
        st.lists(members, min_size=LAYERS, max_size=LAYERS).map(PerLayer),
    )


# Any pattern for HEADS heads and LAYERS layers that leaves all pairs their distances, then any pattern at all.
UNPLACED = st.recursive(st.one_of(LEAVES, named("layered")), _composed, max_leaves=6)
PLACED = st.one_of(named("rerope"), named("self_extend"), named("streaming_llm"))
PATTERNS = st.one_of(
    UNPLACED,
    PLACED,
    st.lists(st.one_of(UNPLACED, PLACED), min_size=LAYERS, max_size=LAYERS).map(PerLayer),
)
CALLS = st.builds(
    Call,
    causal=st.booleans(),
    heads=st.just(HEADS),
    layer=count(0, LAYERS - 1),
    length=count(1, 17),
    chosen=st.lists(count(0, 16), max_size=2, unique=True).map(sorted).map(tuple),
)

"""The published selectors: their formulas written down with loops, and what each of them alone promises."""

import math

import pytest
import torch
from brute_force import check_causal
from torch.nn.functional import normalize

from hf_sparse.backends import Call, attend
from hf_sparse.patterns import get_pattern
from hf_sparse.patterns.full import Full
from hf_sparse.selectors import BlockIndex, block_index, divided, gsa_on_device
from hf_sparse.selectors.esa import EssentialSparseAttention
from hf_sparse.selectors.gsa import GatherScatterAttention
from hf_sparse.selectors.gsa_on_device import GsaOnDevice
from hf_sparse.selectors.kvstar import KVStar
from hf_sparse.selectors.threshold import Threshold

THRESHOLDS = [
    Threshold(block=4, local=1),
    Threshold(block=4, query_block=1, p=0.6, represent="minmax", sinks=0),
    Threshold(block=4, p=0.7, keep=5, local=0),
    Threshold(block=4, above=0.1, local=0, represent="weighted"),
    Threshold(block=4, above=-0.2, keep=0.6, query_block=2),
]
ESAS = [
    EssentialSparseAttention(block=5, keep=0.6),
    EssentialSparseAttention(block=8, keep=4, local=0),  # 5 queries may lie in two blocks
]
GSAS = [
    GatherScatterAttention(block=4, least=4, most=6, representatives=2, local=0),
    GatherScatterAttention(block=6, keep=0.9, least=2, most=4, query_block=2, local=0),
    GatherScatterAttention(block=4, keep=7, least=2, most=3, representatives=4, local=1),
]
ON_DEVICE = [
    GsaOnDevice(block=4, keep=0.5, dense_layers=0),
    GsaOnDevice(block=3, keep=5, dense_layers=0, bits=19, seed=5, sinks=0, local=1, query_block=1),
]
KVSTARS = [
    KVStar(block=8, keep=0.6, local=0),
    KVStar(block=6, query_block=3, keep=4, pairs=3, channels=0.5, local=1),
    KVStar(block=2, query_block=2, keep=2, pairs=1, channels=1.0, sinks=0, local=0),  # asks before 8 queries
]
SELECTORS = [*THRESHOLDS, *ESAS, *GSAS, *ON_DEVICE, *KVSTARS]
each = pytest.mark.parametrize("selector", SELECTORS, ids=str)
SHAPES = [(2, 2, 53), (4, 2, 61), (3, 1, 48)]


def tensors(heads, kv_heads, length, rows=1, seed=0, size=8):
    made = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, length, size), (rows, kv_heads, length, size), (rows, kv_heads, length, size)]
    return [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]


def listed(lists):
    """Return lists [R, G, J, m] without what is behind the last entry of each."""
    return [[[[x for x in one if x >= 0] for one in g] for g in row] for row in lists.tolist()]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean(vectors):
    return [sum(x) / len(vectors) for x in zip(*vectors, strict=True)]


def softmax(scores):
    most = max(scores.values())
    exps = {name: math.exp(x - most) for name, x in scores.items()}
    return {name: x / sum(exps.values()) for name, x in exps.items()}


def rows_of(selector, key, block):
    return key[block * selector.block : (block + 1) * selector.block]


# Each formula returns the scores {block: score} of some blocks. queries: [H][N][D] and keys: [H_kv][N][D], lists of
# numbers; own: the queries of the key head's own heads; ask: the position of the query that asks.


def threshold_formula(selector, queries, keys, own, key, ask, blocks):
    found = dict.fromkeys(blocks, 0.0)
    for query in own:
        scores = {}
        for b in blocks:
            rows = rows_of(selector, key, b)
            if selector.represent == "mean":
                score = dot(query[ask], mean(rows))
            elif selector.represent == "minmax":
                channels = list(zip(*rows, strict=True))
                score = sum(max(q * min(c), q * max(c)) for q, c in zip(query[ask], channels, strict=True))
            else:
                assert selector.represent == "weighted"
                last, stands = (b + 1) * selector.block - 1, []
                for head in own:
                    exact = {i: dot(head[last], row) / math.sqrt(len(row)) for i, row in enumerate(rows)}
                    weights = softmax(exact)
                    stands.append(
                        [sum(weights[i] * row[d] for i, row in enumerate(rows)) for d in range(len(rows[0]))]
                    )
                score = dot(query[ask], mean(stands))
            scores[b] = score / math.sqrt(len(query[ask]))
        if selector.above is None:
            scores = softmax(scores)
        for b in blocks:
            found[b] += scores[b] / len(own)
    return found


def esa_formula(selector, queries, keys, own, key, ask, blocks):
    shared = len(queries) // len(keys)
    asked, stands = [], {b: [] for b in blocks}
    for kv, head in enumerate(keys):  # one vector for all heads, flattened
        asked += mean([query[ask] for query in queries[kv * shared : (kv + 1) * shared]])
        for b in blocks:
            stands[b] += mean(rows_of(selector, head, b))
    return {b: dot(asked, stands[b]) for b in blocks}


def gsa_formula(selector, queries, keys, own, key, ask, blocks):
    size, shared, found = selector.block // selector.representatives, len(queries) // len(keys), {}
    for b in blocks:
        found[b] = 0.0
        for h, query in enumerate(queries):
            rows, products = rows_of(selector, keys[h // shared], b), []
            for start in range(0, selector.block, size):
                stands = mean(rows[start : start + size])
                products.append(dot(query[ask], stands) / math.sqrt(dot(stands, stands)))
            found[b] += max(products) / len(queries)
    return found


def on_device_formula(selector, queries, keys, own, key, ask, blocks):
    size = len(key[0])
    made = torch.Generator().manual_seed(selector.seed)
    directions = torch.randn(size, selector.bits or size, generator=made).T.tolist()

    def bits(vector):
        return [dot(vector, direction) < 0 for direction in directions]

    found = {}
    for b in blocks:
        known, least = [bits(row) for row in rows_of(selector, key, b)], []
        for query in own:
            asked = bits(query[ask])
            least.append(min(sum(x != y for x, y in zip(asked, bit, strict=True)) for bit in known))
        found[b] = -sum(least) / len(least)
    return found


def kvstar_formula(selector, queries, keys, own, key, ask, blocks, channels=None):
    size, found = len(key[0]), dict.fromkeys(blocks, 0.0)
    merged = []  # block, kept channels, and their mean
    for b in blocks:
        rows = rows_of(selector, key, b)
        strength = [(-sum(abs(row[d]) for row in rows), d) for d in range(size)]
        kept = channels or [d for _, d in sorted(strength)[: round(selector.channels * size)]]
        for start in range(0, selector.block, selector.pairs):
            stands = mean(rows[start : start + selector.pairs])
            merged.append((b, kept, [stands[d] for d in kept]))
    for query in own:
        for t in range(max(0, ask - 7), ask + 1):
            scores = {
                i: dot([query[t][d] for d in kept], stands) for i, (_, kept, stands) in enumerate(merged)
            }
            for i, mass in softmax(scores).items():
                found[merged[i][0]] += mass
    return found


FORMULAS = {
    Threshold: threshold_formula,
    EssentialSparseAttention: esa_formula,
    GatherScatterAttention: gsa_formula,
    GsaOnDevice: on_device_formula,
    KVStar: kvstar_formula,
}


def budget(selector, seen):
    """Return how many of `seen` blocks are read."""
    if isinstance(selector.keep, int):
        return selector.keep
    count = math.ceil(round(selector.keep * seen, 6))
    if isinstance(selector, GatherScatterAttention):
        count = max(min(count, selector.most), selector.least)
    return count


def chosen(selector, scores, room):
    """Return the blocks that are taken, the best first."""
    order = [b for _, b in sorted((-score, b) for b, score in scores.items())][:room]
    if not isinstance(selector, Threshold):
        return order
    if selector.above is not None:
        return [b for b in order if scores[b] > selector.above]
    taken, mass = [], 0.0
    for b in order:
        if mass < selector.p:
            taken.append(b)
            mass += scores[b]
    return taken


def by_formula(selector, query, key):
    """Return what one sequence selects, [H_kv][J], lists of blocks; query: [H, N, D]; key: [H_kv, N, D]."""
    queries, keys = query.tolist(), key.tolist()
    shared, block, found = len(queries) // len(keys), selector.block, []
    for kv, head in enumerate(keys):
        own_heads, lists = queries[kv * shared : (kv + 1) * shared], []
        for ask in range(0, query.shape[1], selector.queries):
            own = ask // block
            before = selector.local + (1 if block % selector.queries and selector.queries % block else 0)
            kept = {b for b in range(own + 1) if b < selector.sinks or b >= own - before}
            blocks = sorted(set(range(own + 1)) - kept)
            scores = (
                FORMULAS[type(selector)](selector, queries, keys, own_heads, head, ask, blocks)
                if blocks
                else {}
            )
            lists.append(chosen(selector, scores, max(0, budget(selector, own + 1) - len(kept))))
        found.append(lists)
    return found


@each
@pytest.mark.parametrize(("heads", "kv_heads", "length"), SHAPES)
def test_each_selector_is_its_formula(selector, heads, kv_heads, length):
    query, key, _ = tensors(heads, kv_heads, length)
    (found,) = listed(BlockIndex(selector).select(query, key).lists)
    wanted = by_formula(selector, query[0], key[0])
    assert found * (len(wanted) // len(found)) == wanted
    last = [lists[-1] for lists in wanted]
    candidates = (length - 1) // selector.queries * selector.queries // selector.block + 1
    assert any(last) and all(len(one) < candidates for one in last), "something is taken, something left out"


@pytest.mark.parametrize(("heads", "kv_heads", "length"), SHAPES)
def test_all_keys_and_the_last_queries_of_a_prompt_decide_for_all_of_it(heads, kv_heads, length):
    selector = KVStar(block=4, query_block=3, keep=4, channels=0.5, local=0, selection="prompt")
    query, key, _ = tensors(heads, kv_heads, length)
    (found,) = listed(BlockIndex(selector).select(query, key).lists)
    shared, queries, whole = heads // kv_heads, query[0].tolist(), length // 4 * 4
    for kv, head in enumerate(key[0].tolist()):
        own, lists = queries[kv * shared : (kv + 1) * shared], []
        strength = sorted((-sum(abs(row[d]) for row in head[:whole]), d) for d in range(len(head[0])))
        channels = [d for _, d in strength[: round(len(strength) / 2)]]
        for ask in range(0, length, 3):
            blocks = list(
                range(1, ask // 4 - 1)
            )  # not the first, the query's own and, for 3 queries, the one before
            last = length - 1
            scores = (
                kvstar_formula(selector, queries, None, own, head, last, blocks, channels) if blocks else {}
            )
            lists.append(chosen(selector, scores, max(0, 4 - min(3, ask // 4 + 1))))
        assert found[kv] == lists
    assert any(map(len, found[0]))


def test_what_comes_after_a_prompt_selects_alike_in_chunks_and_token_by_token():
    query, key, _ = tensors(4, 2, 67)
    selector, found = KVStar(block=4, keep=4, channels=0.5, local=0, query_block=1, selection="prompt"), []
    for lengths in ((20, 47), (20, *(1,) * 47)):
        held, end, lists = BlockIndex(selector), 0, []
        for length in lengths:
            end += length
            lists += listed(held.select(query[:, :, end - length : end], key[:, :, :end]).lists[:, :1])[0][0]
        found.append(lists)
    assert found[0] == found[1]


@each
def test_in_chunks_and_token_by_token_the_same_is_selected(selector):
    query, key, _ = tensors(4, 2, 67, rows=2)
    whole = listed(BlockIndex(selector).select(query, key).lists)
    for lengths in ((1,) * 67, (7, 1, 19, 2, 38), (30, *(1,) * 37)):
        held, end = BlockIndex(selector), 0
        for length in lengths:
            end += length
            part = held.select(query[:, :, end - length : end], key[:, :, :end])
            wanted = [[g[part.first_block : -(-end // selector.queries)] for g in row] for row in whole]
            found = listed(part.lists)
            assert [row * (len(wanted[0]) // len(row)) for row in found] == wanted, (lengths, end)


@each
def test_a_later_token_changes_nothing_before_it(selector):
    check_causal(selector, *tensors(4, 2, 59), (3, 17, 32, 58))


@each
def test_tokens_taken_back_and_rows_put_together_leave_no_trace(selector):
    query, key, _ = tensors(4, 2, 80, rows=2)
    other, key2, _ = tensors(4, 2, 80, rows=2, seed=1)
    held = BlockIndex(selector)
    held.select(query[:, :, :70], key[:, :, :70])
    held.select(other[:, :, 70:], torch.cat((key[:, :, :70], key2[:, :, 70:]), 2))
    held.select(query[:, :, 63:64], key[:, :, :64])  # goes on at 63
    held = held.taken(torch.tensor([1])).joined([held.taken(torch.tensor([0]))])
    query, key = query.flip(0), key.flip(0)
    for end in range(65, 81):
        part = held.select(query[:, :, end - 1 : end], key[:, :, :end])
        whole = BlockIndex(selector).select(query[:, :, :end], key[:, :, :end])
        assert listed(part.lists) == listed(whole.lists[:, :, -1:])


@each
def test_what_is_scored_part_by_part_is_selected_the_same(selector, monkeypatch):
    query, key, _ = tensors(4, 2, 61)
    whole = listed(BlockIndex(selector).select(query, key).lists)
    own, parts = type(selector).score_among, []

    def seen(self, asked, blocks, among):
        parts.append(among.shape)
        return own(self, asked, blocks, among)

    monkeypatch.setattr(type(selector), "score_among", seen)
    monkeypatch.setattr(block_index, "_SCORES", 2000)
    monkeypatch.setattr(gsa_on_device, "_UNPACKED", 200)
    assert listed(BlockIndex(selector).select(query, key).lists) == whole
    computed = {
        GatherScatterAttention: lambda: selector.representatives,
        GsaOnDevice: lambda: selector.block,
        KVStar: lambda: 8 * selector.block // selector.pairs,
    }.get(type(selector), lambda: 1)()
    count, blocks = max(parts)
    assert count == min(len(whole[0][0]), max(1, 2000 // (4 * blocks * computed)))


@each
def test_what_is_selected_is_read_as_the_reference_reads_it(selector):
    found = []
    for backend in ("reference", "torch"):
        given = [x.requires_grad_() for x in tensors(4, 2, 61, rows=2)]
        out = attend(*given, Call(selector), None, backend)
        found.append((out, *torch.autograd.grad(out.sin().sum(), given)))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@each
@pytest.mark.parametrize("size", [1e4, 1e-4, 0.0])
def test_extreme_inputs_stay_finite(selector, size):
    given = [(x * size).float().requires_grad_() for x in tensors(4, 2, 61)]
    out = attend(*given, Call(selector), None, "torch")
    grads = torch.autograd.grad(out.sum(), given)
    assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("selector", [*THRESHOLDS, *ESAS, *GSAS, *KVSTARS], ids=str)  # a sign is always one
def test_a_key_that_is_no_number_comes_last_and_does_not_hide_the_others(selector):
    query, key, _ = tensors(2, 1, 61)
    clean = listed(BlockIndex(selector).select(query, key).lists)[0][0]
    key[:, :, 9] = float("nan")
    found = listed(BlockIndex(selector).select(query, key).lists)[0][0]
    bad = 9 // selector.block
    for new, old in zip(found, clean, strict=True):
        others = set(old) - {bad}
        assert bad not in new[:-1]
        shares = isinstance(selector, (Threshold, KVStar))  # the others have more where one has none
        assert (not others or new) if shares else others <= set(new)


# threshold


def test_the_fewest_blocks_that_reach_the_mass_are_taken():
    query, key, _ = tensors(1, 1, 160)
    for p in (0.2, 0.5, 0.95):
        selector = Threshold(block=4, local=0, p=p)
        for number, taken in enumerate(listed(BlockIndex(selector).select(query, key).lists)[0][0]):
            ask, blocks = 4 * number, range(1, number)
            if not blocks:
                assert not taken
                continue
            scores = torch.stack([query[0, 0, ask] @ key[0, 0, 4 * b : 4 * b + 4].mean(0) for b in blocks])
            mass = dict(zip(blocks, (scores / math.sqrt(8)).softmax(0).tolist(), strict=True))
            assert sum(mass[b] for b in taken) >= p - 1e-12
            assert sum(sorted(mass.values(), reverse=True)[: len(taken) - 1]) < p


def test_lists_are_as_long_as_the_longest_and_of_equal_blocks_the_lower_are_taken():
    query, key, _ = tensors(2, 2, 44, rows=2)
    key[0] = 1  # all blocks are alike to the first row
    found = BlockIndex(Threshold(block=4, local=0, p=0.5)).select(query, key)
    lengths = [[len(one) for one in g] for row in listed(found.lists) for g in row]
    assert found.counts.tolist() == [max(each) for each in zip(*lengths, strict=True)]
    assert found.lists.shape[3] == max(found.counts) and not found.exact
    assert listed(found.lists)[0][0][-1] == [1, 2, 3, 4, 5]  # of 9


@pytest.mark.parametrize("options", [{"p": 1.0}, {"p": 1}, {"above": -1e9}])
def test_everything_above_nothing_is_dense_attention(options):
    query, key, value = tensors(4, 2, 61)
    query = query * 100  # nearly all of the mass is in one block
    dense = attend(query, key, value, Call(Full()), None, "reference")
    selector = Threshold(block=4, query_block=2, **options)
    out = attend(query, key, value, Call(selector), None, "torch")
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-12)


def test_the_share_is_095_and_keep_stays_the_limit():
    assert (Threshold().p, Threshold().above, Threshold().keep) == (0.95, None, 1.0)
    query, key, _ = tensors(1, 1, 400)
    found = BlockIndex(Threshold(block=4, p=1.0, keep=9)).select(query, key)
    assert found.lists.shape[3] == 9 - 4 and found.counts[-1] == 5


# the others


def test_all_heads_select_together_or_each_key_head_for_itself():
    query, key, _ = tensors(4, 2, 61)
    for selector in SELECTORS:
        together = isinstance(selector, (EssentialSparseAttention, GatherScatterAttention))
        assert BlockIndex(selector).select(query, key).lists.shape[1] == (1 if together else 2)


def test_gsa_reads_a_share_within_its_limits():
    published = GatherScatterAttention()
    wanted = {1: 1, 20: 20, 32: 32, 100: 32, 107: 33, 150: 45, 1000: 48}
    assert {seen: published.wanted(seen) for seen in wanted} == wanted
    assert [GatherScatterAttention(keep=60).wanted(seen) for seen in (50, 100)] == [50, 60]
    layers = GatherScatterAttention(keep=[0.9, 0.1])
    assert [divided(layers, layer).selector.wanted(100) for layer in (0, 1)] == [48, 32]


def test_the_length_of_keys_does_not_count_in_gsa():
    query, key, _ = tensors(2, 2, 64)
    selector = GSAS[0]
    scaled = key * torch.rand(16, dtype=key.dtype).repeat_interleave(4)[:, None] * 9
    one, two = (BlockIndex(selector).select(query, x).lists for x in (key, scaled))
    assert torch.equal(one, two)
    blocks = selector.summarise(key.unflatten(2, (-1, 4)), query)
    torch.testing.assert_close(blocks, normalize(key.unflatten(2, (-1, 2, 2)).mean(4), dim=-1))


def test_random_directions_depend_on_the_seed_alone():
    drawn = gsa_on_device._directions
    first = drawn(8, 12, 3, torch.float32, torch.device("cpu"))
    drawn.cache_clear()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    exact = drawn(8, 12, 3, torch.float64, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.double(), exact) and first.shape == (8, 12)
    assert not torch.equal(drawn(8, 12, 4, torch.float64, torch.device("cpu")), exact)
    assert drawn(8, 12, 3, torch.float64, torch.device("cpu")) is exact


@pytest.mark.parametrize("bits", [1, 7, 8, 19])
def test_bits_are_packed_and_come_back(bits):
    given = torch.rand(3, 5, bits, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = gsa_on_device._packed(given)
    assert packed.shape == (3, 5, -(-bits // 8)) and packed.dtype == torch.uint8
    assert torch.equal(gsa_on_device._unpacked(packed, bits).bool(), given)


def test_the_lowest_layers_of_gsa_on_device_are_dense():
    assert [divided(GsaOnDevice(), layer).static == Full() for layer in range(4)] == [
        True,
        True,
        False,
        False,
    ]


def test_before_the_sequence_there_are_no_queries_that_count():
    selector = KVStar(block=4, pairs=2)
    query, key, _ = tensors(4, 2, 16)
    blocks = selector.summarise(key.unflatten(2, (-1, 4)), query)
    asked = query[:, :, None, :8].clone()
    asked[:, :, :, :3] = 0
    masses = selector.score_among(asked, blocks, torch.tensor([[True, False, True, True]]))
    assert masses[0, :, 0, 1].tolist() == [0, 0]
    torch.testing.assert_close(masses.sum(3), torch.full((1, 2, 1), 5 * 2.0, dtype=masses.dtype))


def test_a_block_of_kvstar_holds_an_eighth_of_its_keys_and_the_numbers_of_its_channels():
    query, key, _ = tensors(2, 2, 64, size=32)
    held = KVStar(block=16).summarise(key.unflatten(2, (-1, 16)), query)
    assert held.shape == (1, 2, 4, 8 + 1, 8)
    strong = key.abs()[0, 1, :16].mean(0).argsort(descending=True)[:8]
    assert held[0, 1, 0, -1].tolist() == strong.tolist()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("threshold", {"p": 0.9, "above": 0.5}, "p and above exclude each other, got p=0.9 and above=0.5"),
        ("threshold", {"p": 0}, "p must be a share of the mass above 0 and up to 1.0, got 0"),
        ("threshold", {"p": 1.1}, "got 1.1"),
        ("threshold", {"p": "all"}, "got 'all'"),
        ("threshold", {"p": True}, "got True"),
        ("threshold", {"p": float("nan")}, "got nan"),
        ("threshold", {"above": float("inf")}, "above must be a finite number such as 0.5, got inf"),
        ("threshold", {"above": "0.5"}, "got '0.5'"),
        ("threshold", {"represent": "max"}, "represent must be"),
        ("esa", {"block": 4}, "query_block must be at most block"),
        ("gsa", {"least": 0}, "least must be >= 1"),
        ("gsa", {"most": 0}, "most must be >= 1"),
        ("gsa", {"least": 9, "most": 8}, "least must not exceed most=8, got 9"),
        ("gsa", {"representatives": 0}, "representatives must be >= 1"),
        ("gsa", {"representatives": 3}, "representatives must divide block=128, got 3"),
        ("gsa_on_device", {"bits": 0}, "bits must be >= 1"),
        ("gsa_on_device", {"seed": -1}, "seed must be >= 0"),
        ("kvstar", {"channels": 0}, "channels must lie above 0"),
        ("kvstar", {"pairs": 0}, "pairs must be >= 1"),
        ("kvstar", {"pairs": 3}, "pairs must divide block=64, got 3"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_pattern(name, **options)

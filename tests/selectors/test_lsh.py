"""Hashing: its definition token by token, Reformer's own attention, and the same in chunks."""

import pytest
import torch
from brute_force import check_causal, check_taken_back
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from hf_sparse.backends import Call, attend, recording
from hf_sparse.patterns.sliding_window import SlidingWindow
from hf_sparse.plan import Constraint, Segments, cost
from hf_sparse.selectors import divided
from hf_sparse.selectors.lsh import LSH

ALONE = {"sinks": 0, "local": 0}
SELECTORS = [
    LSH(block=3, buckets=4, seed=1),
    LSH(block=4, buckets=6, rounds=2, **ALONE),
    LSH(block=2, buckets=2, rounds=3, sinks=2, local=1),
    LSH(block=1, buckets=4, rounds=5, **ALONE),
]
SHARED = LSH(block=4, buckets=4, rounds=3, shared_qk=True, **ALONE)
PROMPT = LSH(block=4, rounds=3, shared_qk=True, selection="prompt", seed=2, **ALONE)
each = pytest.mark.parametrize("selector", [*SELECTORS, SHARED], ids=str)


def random(heads, kv_heads, length, rows=1, seed=0, size=6):
    made = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, length, size), (rows, kv_heads, length, size), (rows, kv_heads, length, size)]
    return [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]


def heads_of(selector):
    return (4, 4) if selector.shared_qk else (4, 2)


def bucket(vector, directions):
    products = [float(vector @ directions[:, i]) for i in range(directions.shape[1])]
    products += [-x for x in products]
    return products.index(max(products))


def found(selector, query, key, kv, kv_heads):
    """Return for each query how often each position is found, {position: times}; query, key [N, D] of one head."""
    made = torch.Generator().manual_seed(selector.seed)
    shape = (kv_heads, key.shape[1], selector.rounds, selector.buckets // 2)
    directions = torch.randn(shape, generator=made)[kv].double()
    times = [{} for _ in query]
    for number in range(selector.rounds):
        filled = {}  # the positions in each bucket, in order
        for t in range(len(query)):
            filled.setdefault(bucket(key[t], directions[:, number]), []).append(t)
            own = filled.get(bucket(query[t], directions[:, number]), [])
            latest = (len(own) - 1) // selector.block
            for place, k in enumerate(own):
                if place // selector.block >= latest - 1:
                    times[t][k] = times[t].get(k, 0) + 1
    return times


def weights_of(selector, query, key, scale=None):
    """Return the weights of the reference, [H, Q, K]."""
    eye = torch.eye(key.shape[2], dtype=key.dtype).expand(1, key.shape[1], -1, -1)
    return attend(query, key, eye, Call(selector, scale=scale), None, "reference")[0]


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(4, 2, 41), (2, 2, 60)])
def test_it_is_its_definition(selector, heads, kv_heads, length):
    query, key, _ = random(heads, kv_heads, length)
    pairs, left_out = weights_of(selector, query, key) > 0, 0
    for head in range(heads):
        kv = head * kv_heads // heads
        for t, times in enumerate(found(selector, query[0, head], key[0, kv], kv, kv_heads)):
            own, blocks = t // selector.block, [k // selector.block for k in range(t + 1)]
            kept = {k for k, b in enumerate(blocks) if b < selector.sinks or b >= own - selector.local}
            left_out += t + 1 - len(kept | set(times))
            assert set(torch.nonzero(pairs[head, t])[:, 0].tolist()) == kept | set(times), (head, t)
    assert left_out


def test_queries_that_are_keys_count_pairs_and_see_themselves_only_alone():
    query, _, _ = random(2, 2, 50)
    got = weights_of(SHARED, query, query, scale=0.3)
    for head in range(2):
        for t, times in enumerate(found(SHARED, query[0, head], query[0, head], head, 2)):
            assert times.pop(t) == SHARED.rounds
            scores = {
                k: count * torch.exp(0.3 * query[0, head, t] @ query[0, head, k])
                for k, count in times.items()
            }
            want = torch.zeros(50, dtype=torch.float64)
            for k, score in scores.items():
                want[k] = score / sum(scores.values())
            if not scores:
                want[t] = 1
            torch.testing.assert_close(got[head, t], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [64, 80, 77, 16])
@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("buckets", [8, None])
def test_a_whole_prompt_is_read_as_reformer_reads_it(length, rounds, buckets):
    """Its attention layer, which pads to whole chunks, with a number of buckets or what it makes of the length."""
    config = ReformerConfig(
        num_attention_heads=2,
        attention_head_size=8,
        hidden_size=16,
        is_decoder=True,
        lsh_attn_chunk_length=16,
        num_hashes=rounds,
        num_buckets=buckets,
        hash_seed=3,
        lsh_attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    layer = LSHSelfAttention(config).eval()
    hidden = torch.randn(2, length, 16)
    padded = torch.nn.functional.pad(hidden, (0, 0, 0, -length % 16))
    mask = (torch.arange(padded.shape[1]) < length).expand(2, -1)
    with torch.no_grad():
        want = layer(padded, attention_mask=mask).hidden_states[:, :length]
        shared, value = (
            x(hidden).unflatten(2, (2, 8)).transpose(1, 2) for x in (layer.query_key, layer.value)
        )
        key = layer._len_and_dim_norm(shared, 8**0.5)
    # As many buckets as it made of the padded length, of which it keeps a note.
    made = layer.num_buckets if length > 16 else 8
    assert isinstance(made, int)
    selector = LSH(rounds=rounds, block=16, buckets=made, shared_qk=True, seed=3, selection="prompt", **ALONE)
    if buckets is None and not length % 16 and length > 16:
        assert LSH(block=16, shared_qk=True, selection="prompt", **ALONE).buckets_of(length) == made
    # Its score for a token alone, -100,000, is rounded to 1/128 in float32 when rounds are added, so its weights are.
    alone = (
        selector.index().select(shared, key).counts(2, torch.arange(length), torch.arange(length)).tril(-1)
    )
    alone = (alone == 0).all(-1)[..., None]
    want = want.reshape(2, length, 2, 8).transpose(1, 2)
    for backend in ("reference", "torch"):
        got = attend(shared, key, value, Call(selector, scale=1.0), None, backend)
        torch.testing.assert_close(got * ~alone, want * ~alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got * alone, want * alone, rtol=2 / 128, atol=1e-5)
        torch.testing.assert_close(got * alone, value * alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("selector", [*SELECTORS, SHARED, PROMPT], ids=str)
@pytest.mark.parametrize("extra", [{}, {"constraint": Constraint(window=20)}, {"softcap": 2.0}], ids=str)
def test_outputs_and_gradients_of_the_reference(selector, extra):
    given = [x.requires_grad_() for x in random(*heads_of(selector), 77, rows=2)]
    results = []
    for backend in ("reference", "torch"):
        with recording() as seen:
            out = attend(*given, Call(selector, **extra), None, backend)
        made = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append((out, *torch.autograd.grad(out, given, made)))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    # Of queries that are keys each pair counts as often as it is found.
    position, constraint = torch.arange(77), extra.get("constraint", Constraint())
    query, key, _ = (x.detach() for x in given)
    times = selector.index().select(query, key, 0, constraint.bounds()[0])
    times = times.counts(4, position, position).clamp(max=64 if selector.shared_qk else 1)
    if not selector.shared_qk:
        times |= divided(selector, 0).static.mask(77)[0].long()
    times = times * constraint.admits(position[:, None], position)
    assert seen.calls[0].pairs == int(times.sum())


@each
def test_in_chunks_and_token_by_token_the_same_is_read(selector):
    query, key, value = random(*heads_of(selector), 60, rows=2)
    whole = attend(query, key, value, Call(selector), None, "reference")
    for lengths in ((1,) * 60, (7, 1, 19, 2, 31), (40, *(1,) * 20)):
        index, end = selector.index(), 0
        for length in lengths:
            end += length
            part = query[:, :, end - length : end]
            made = index.select(part, key[:, :, :end])
            call, segments = Call(selector), Segments.whole(2, end)
            with recording() as seen:
                got = attend(
                    part, key[:, :, :end], value[:, :, :end], call, segments, "torch", selections=[made]
                )
            wanted = "step" if length == 1 and not selector.shared_qk else "flash+tiled"
            assert seen.calls[0].operator == wanted
            torch.testing.assert_close(got, whole[:, :, end - length : end], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_token_whose_buckets_are_empty_reads_what_is_kept(kv_heads, dtype):
    query, key, value = (x[:, :, :1].to(dtype) for x in random(4, kv_heads, 1))
    selector = LSH(buckets=64, rounds=1)
    made = selector.index().select(query, -query[:, :: 4 // kv_heads])
    assert not made.mask(4, torch.tensor([0]), torch.tensor([0])).any()
    got = attend(query, key, value, Call(selector), Segments.whole(1, 1), "torch", selections=[made])
    torch.testing.assert_close(got, value.repeat_interleave(4 // kv_heads, 1))


def test_tokens_after_a_prompt_that_was_sorted_whole_are_read_by_their_buckets():
    query, key, _ = random(2, 2, 60)
    index = PROMPT.index()
    index.select(query[:, :, :40], key[:, :, :40])
    parts = [index.select(query[:, :, end - 1 : end], key[:, :, :end]) for end in range(41, 61)]
    causal = LSH(block=4, rounds=3, buckets=16, shared_qk=True, seed=2, **ALONE).index().select(query, key)
    for end, part in zip(range(41, 61), parts, strict=True):
        asked = torch.tensor([end - 1]), torch.arange(end)
        assert torch.equal(part.counts(2, *asked), causal.counts(2, *asked))


@each
def test_tokens_taken_back_leave_no_trace(selector):
    texts = (random(*heads_of(selector), 120, seed=seed)[:2] for seed in (0, 1))
    check_taken_back(selector, *texts, lambda selection, *asked: selection.counts(4, *asked))


@each
def test_a_later_token_changes_nothing_before_it(selector):
    check_causal(selector, *random(*heads_of(selector), 47), (3, 17, 30, 46))


@pytest.mark.parametrize("selector", [SELECTORS[0], SHARED], ids=str)
def test_padded_rows_and_patterns_beside(selector):
    query, key, value = random(*heads_of(selector), 50, rows=3)
    segments = Segments.from_mask(torch.arange(50) >= torch.tensor([0, 7, 20])[:, None])
    pattern = selector | SlidingWindow(9)
    want, got = (attend(query, key, value, Call(pattern), segments, name) for name in ("reference", "torch"))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    alone = attend(query[1:2, :, 7:], key[1:2, :, 7:], value[1:2, :, 7:], Call(pattern), None, "reference")
    torch.testing.assert_close(want[1:2, :, 7:], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be >= 1"),
        ({"buckets": 5}, "buckets must be even, as each direction has an opposite, got 5; choose 6"),
        ({"selection": "prompt"}, "needs shared_qk=True"),
        ({"shared_qk": True}, "pass sinks=0, local=0"),
        ({"shared_qk": 1, "sinks": 0, "local": 0}, "shared_qk must be"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        LSH(**options)


def test_queries_are_no_keys_where_key_heads_are_fewer():
    with pytest.raises(ValueError, match="4 query heads and 2 key heads; leave it False"):
        attend(*random(4, 2, 20), Call(SHARED))


def test_each_query_head_reads_keys_of_its_own():
    """What one more token reads: kept keys once for each key head, what is in buckets once for each query head."""
    costs = [
        cost(LSH(block=8), 4096, heads=8, kv_heads=kv_heads, head_dim=4, dtype_bytes=4) for kv_heads in (8, 2)
    ]
    kept, codes, found = 8 + 2 * 8 + 8, 4.0 * 4096 * 2 * 4, 2 * 8 * 4
    assert [made.kv_bytes_per_step for made in costs] == [
        32 * (kept * kv_heads + found * 8) + codes * kv_heads for kv_heads in (8, 2)
    ]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_token_alone_weighs_its_value_fully_in_float32(backend):
    query, _, value = (x.float().requires_grad_() for x in random(2, 2, 9))
    out = attend(query, query, value, Call(SHARED, scale=3.0), None, backend)
    (grad,) = torch.autograd.grad(out[:, :, 0].sum(), value)
    torch.testing.assert_close(grad[:, :, 0], torch.ones(1, 2, 6), rtol=0, atol=2e-4)

"""Probes: the samples are what they say, the answers are judged as plain logits judge them, the figures follow."""

import csv
import dataclasses
import json
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)

import hf_sparse
from hf_sparse.evaluate import variants
from hf_sparse.evaluate.probes import (
    PROBES,
    Copy,
    Material,
    Needle,
    NeedleMultikey,
    Passkey,
    Variables,
    as_json,
    probe,
    probe_csv,
    probe_pictures,
    probe_table,
    save_probes,
)
from hf_sparse.evaluate.probes.cells import lay_out, make_samples
from hf_sparse.evaluate.probes.work import Work
from hf_sparse.evaluate.processes import Processes

TINY_BASE = Path(__file__).resolve().parents[2] / "recipes" / "tiny_base"
DEPTH_PROBES = [
    Passkey(),
    Passkey(wording="prose", digits=7),
    Needle(),
    Needle(values="uuids", wording="prose"),
    NeedleMultikey(),
    NeedleMultikey(keys=3, values="uuids"),
    Variables(hops=2),
    Variables(hops=2, ask="value"),
]
SMALL = {"lengths": [150], "depths": [0.0, 1.0], "samples": 3}


def samples_of(tokenizer, one, places, length=400, samples=2, seed=0, haystack=None):
    material = Material.of(tokenizer, haystack, length)
    cells = lay_out([one], [length], places, places if one.axis == "distance" else None, material)
    return material, make_samples(cells, samples, material, seed)


def find(ids, part):
    """Where `part` begins in ids; it must stand there exactly once."""
    found = [i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)].tolist() == part]
    assert len(found) == 1, found
    return found[0]


def draw_of(one, index):
    """What sample `index` of seed 0 is drawn from."""
    return np.random.default_rng([0, zlib.crc32(str(one).encode()), index])


@pytest.mark.parametrize("one", DEPTH_PROBES, ids=str)
def test_the_fact_lies_at_the_exact_depth(one, tiny_tokenizer):
    depths = [0.0, 0.3, 1.0]
    material, made = samples_of(tiny_tokenizer, one, depths)
    assert all(len(sample.ids) == 400 and sample.ids[0] == 0 for sample in made)
    for i, sample in enumerate(made):
        depth = depths[i // 2]
        told = one.tell(depth, draw_of(one, i % 2))
        own = next(text for place, text in told.facts if place == depth)
        question, answer = material.split(told.question, told.answer)
        end = len(question) + len(answer)
        assert sample.ids[-end:].tolist() == question + answer and sample.answer == len(answer)
        before = [len(material.encode(text)) for place, text in told.facts if place < depth]
        begin = 1 + len(material.encode(told.intro))
        words = begin + sum(len(material.encode(text)) for _, text in told.facts) + end
        assert find(sample.ids, material.encode(own)) == begin + sum(before) + round(depth * (400 - words))


def test_words_say_what_they_should(tiny_tokenizer):
    _, (sample,) = samples_of(tiny_tokenizer, Passkey(), [0.5], samples=1)
    text = tiny_tokenizer.decode(sample.ids)
    key = text.split("PASS_KEY = ")[1][:5]
    assert key.isdigit() and text.count("PASS_KEY = ") == 2 and text.endswith(f"\nPASS_KEY = {key}")
    assert tiny_tokenizer.decode(sample.ids[-sample.answer :]) == f" {key}"
    _, (sample,) = samples_of(tiny_tokenizer, NeedleMultikey(keys=3), [0.5], samples=1)
    facts = [line.split(" = ") for line in tiny_tokenizer.decode(sample.ids).splitlines() if " = " in line]
    asked, answer = facts.pop()
    assert len(facts) == 3 and len({value for _, value in facts}) == 3 and [asked, answer] in facts
    _, (sample,) = samples_of(tiny_tokenizer, Variables(hops=2, chains=2), [0.0], length=600, samples=1)
    text = tiny_tokenizer.decode(sample.ids)
    links = dict(line.split(" = ") for line in text.splitlines() if " = " in line)
    value, _, names = text.splitlines()[-1].removeprefix("variables that are ").partition(": ")
    first, second, third = names.split(", ")
    assert (links[first], links[second], links[third]) == (value, first, second) and len(links) == 6


def test_chains_are_in_order_behind_their_first_link(tiny_tokenizer):
    for depth in (0.0, 0.5, 1.0):
        _, made = samples_of(tiny_tokenizer, Variables(hops=3), [depth], length=600, samples=4)
        for sample in made:
            text = tiny_tokenizer.decode(sample.ids)
            names = text.rpartition(": ")[2].split(", ")
            places = [text.index(f"\n{name} = ") for name in names]
            assert places == sorted(places)


@pytest.mark.parametrize("between", ["haystack", "random"])
def test_the_copy_stands_at_the_exact_distance(between, tiny_tokenizer):
    one = Copy(block=16, between=between)
    distances = [16, 17, 100, 383]
    _, made = samples_of(tiny_tokenizer, one, distances)
    for i, sample in enumerate(made):
        distance = distances[i // 2]
        block = sample.ids[-16:]
        assert len(sample.ids) == 400 and sample.answer == 15 and sample.ids[0] == 0
        assert (sample.ids[400 - 16 - distance : 400 - distance] == block).all()
        assert len(set(block.tolist())) == 16 and min(block) > 2  # no special token
        if between == "random":
            assert np.isin(sample.ids[1:], block).sum() == 32
    assert (made[0].ids[-16:] == made[6].ids[-16:]).all()  # the same block at every distance
    assert (made[0].ids[-16:] != made[1].ids[-16:]).any()


def test_samples_hang_on_the_seed_alone(tiny_tokenizer):
    one, places = Passkey(), [0.2, 0.9]
    first, again, other = (samples_of(tiny_tokenizer, one, places, seed=seed)[1] for seed in (1, 1, 2))
    assert all((a.ids == b.ids).all() for a, b in zip(first, again, strict=True))
    assert any((a.ids != b.ids).any() for a, b in zip(first, other, strict=True))


def test_the_haystack_is_the_documents(tiny_tokenizer):
    _, (sample,) = samples_of(
        tiny_tokenizer, Passkey(), [1.0], samples=1, haystack=["def f():\n    return 7\n"]
    )
    text = tiny_tokenizer.decode(sample.ids)
    assert text.count("return 7") > 5 and "grass" not in text


def test_a_tokenizer_without_bos_begins_with_the_haystack(tiny_tokenizer):
    tiny_tokenizer.bos_token = None
    try:
        material, (sample,) = samples_of(tiny_tokenizer, Passkey(), [1.0], samples=1)
    finally:
        tiny_tokenizer.bos_token = "<s>"
    assert material.prefix == [] and len(sample.ids) == 400 and 0 not in sample.ids


def test_answers_are_judged_as_the_full_logits_judge_them(tiny_model, tiny_tokenizer):
    result = probe(tiny_model, tiny_tokenizer, ["passkey", Copy(block=8)], distances=[20], **SMALL)
    made = [
        *samples_of(tiny_tokenizer, Passkey(), [0.0, 1.0], 150, 3)[1],
        *samples_of(tiny_tokenizer, Copy(block=8), [20], 150, 3)[1],
    ]
    assert len(result.rows) == len(made) == 9
    for row, sample in zip(result.rows, made, strict=True):
        ids = torch.from_numpy(sample.ids.astype(np.int64))
        with torch.no_grad():
            logits = tiny_model(ids[None]).logits[0, -sample.answer - 1 : -1].double()
        answer = ids[-sample.answer :]
        assert row["right"] == int((logits.argmax(-1) == answer).sum())
        nats = -logits.log_softmax(-1).gather(1, answer[:, None]).sum().item()
        assert row["nats"] == pytest.approx(nats, rel=1e-5) and row["answered"] == sample.answer


def test_the_figures_follow_from_the_rows(tiny_model, tiny_tokenizer):
    result = probe(tiny_model, tiny_tokenizer, ["passkey"], patterns=[hf_sparse.SlidingWindow(8)], **SMALL)
    dense, sparse = result.runs
    for run in result.runs:
        rows = [row for row in result.rows if row["run"] == run.title and row["depth"] == 1.0]
        answered = sum(row["answered"] for row in rows)
        assert result.figure(run, 1, "tokens_right").estimate == sum(row["right"] for row in rows) / answered
        nats = result.figure(run, 1, "nats_per_token")
        assert nats.estimate == pytest.approx(sum(row["nats"] for row in rows) / answered)
        assert nats.low <= nats.estimate <= nats.high and nats.units == 3
    above = result.above_dense(sparse, 1, "nats_per_token").estimate
    figures = [result.figure(run, 1, "nats_per_token").estimate for run in (sparse, dense)]
    assert above == pytest.approx(figures[0] - figures[1])
    rows = [row for row in result.rows if row["run"] == sparse.title]
    assert sparse.density == sum(r["pairs"] for r in rows) / sum(r["dense_pairs"] for r in rows) < 0.2
    assert (sparse.layers, sparse.calls, dense.calls) == (2, 12, 0) and sparse.window == 8


def test_all_tokens_must_be_right_for_an_answer_to_be(tiny_model, tiny_tokenizer):
    result = probe(tiny_model, tiny_tokenizer, ["passkey"], **SMALL)
    run = dataclasses.replace(
        result.runs[0], answered=np.array([4, 4, 4, 1, 1, 1]), right=np.array([4, 3, 0, 1, 1, 1])
    )
    assert result.figure(run, 0, "accuracy").estimate == 1 / 3
    assert result.figure(run, 0, "tokens_right").estimate == 7 / 12
    assert result.figure(run, 1, "accuracy").estimate == 1.0


def test_batches_and_chunks_do_not_change_the_figures(tiny_model, tiny_tokenizer):
    patterns = [hf_sparse.StreamingLLM(sinks=2, window=16)]
    plain, batched, chunked = (
        probe(tiny_model, tiny_tokenizer, ["needle"], patterns=patterns, **SMALL, **options)
        for options in ({}, {"batch_size": 2}, {"prefill_chunk": 40})
    )
    for other in (batched, chunked):
        for mine, theirs in zip(plain.runs, other.runs, strict=True):
            np.testing.assert_allclose(mine.nats, theirs.nats, rtol=1e-5)
            assert (mine.right == theirs.right).all()


def test_processes_share_the_samples(tiny_tokenizer):
    material = Material.of(tiny_tokenizer, None, 150)
    cells = lay_out([Passkey()], [150], [0.0, 1.0], None, material)
    made = make_samples(cells, 3, material, 0)

    class Scorer:
        batch_size = 2

    groups = [
        Work(Scorer(), cells, made, 3, torch.device("cpu"), None, Processes(rank, 3), False).groups()
        for rank in range(3)
    ]
    assert groups == [[[0, 1], [5]], [[2]], [[3, 4]]]


@pytest.fixture(scope="module")
def tiny_base():
    return AutoModelForCausalLM.from_pretrained(
        TINY_BASE, dtype=torch.float32
    ), AutoTokenizer.from_pretrained(TINY_BASE)


def test_copying_shows_where_the_window_ends(tiny_base):
    window = hf_sparse.SlidingWindow(32)
    result = probe(
        *tiny_base, [Copy(block=16)], lengths=[160], distances=[31, 32, 33, 64], samples=2, patterns=[window]
    )
    dense, sparse = (
        [cell.estimate for cell in result.headlines(run, "copy(block=16)")] for run in result.runs
    )
    assert min(dense) > 0.85
    assert min(sparse[:2]) > 0.85 and max(sparse[2:]) < 0.1
    assert result.chances[0] == 1 / 4093


def test_the_window_forgets_the_passkey(tiny_base):
    result = probe(
        *tiny_base,
        ["passkey"],
        lengths=[160],
        depths=[0.0, 1.0],
        samples=3,
        patterns=[hf_sparse.SlidingWindow(64)],
    )
    found = [[cell.estimate for cell in result.headlines(run, "passkey")] for run in result.runs]
    assert min(*found[0], found[1][1]) > 0.6 and found[1][0] == 0.0


def test_an_interrupted_run_goes_on_and_gives_the_same_files(tiny_model, tiny_tokenizer, tmp_path):
    def run(folder, **options):
        arguments = {"patterns": ["streaming_llm"], "output": folder, **SMALL, **options}
        save_probes(probe(tiny_model, tiny_tokenizer, ["passkey"], **arguments), folder, pictures=True)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        rows = [json.loads(line) for line in files.pop("probe_samples.jsonl").splitlines()]
        return files | {
            "probe.json": json.loads(files["probe.json"]) | {"timing": None},
            "rows": [row | {"timing": None} for row in rows],
        }

    whole = run(tmp_path / "a")
    assert sorted(whole) == ["evaluation.json", "passkey.png", "probe.csv", "probe.json", "rows"]
    assert whole["passkey.png"].startswith(b"\x89PNG")
    rows = (tmp_path / "a" / "probe_samples.jsonl").read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "evaluation.json").write_bytes(whole["evaluation.json"])
    (tmp_path / "b" / "probe_samples.jsonl").write_bytes(rows[: len(rows) * 2 // 3])
    assert run(tmp_path / "b") == whole
    with pytest.raises(ValueError, match="seed: 0, now 1"):
        run(tmp_path / "a", seed=1)
    assert run(tmp_path / "a", seed=1, overwrite=True)["rows"] != whole["rows"]


def test_table_and_csv_hold_every_cell(tiny_model, tiny_tokenizer):
    result = probe(
        tiny_model,
        tiny_tokenizer,
        ["passkey", Copy(block=8)],
        lengths=[100, 150],
        depths=[0.0, 0.5],
        samples=2,
        patterns=["sliding_window"],
    )
    figures = as_json(result)
    assert json.loads(json.dumps(figures)) == figures
    assert [cell.place for cell in result.cells[4:]] == [
        8,
        16,
        32,
        64,
    ] * 2  # powers of two that fit 100 tokens
    rows = list(csv.DictReader(probe_csv(figures).splitlines()))
    assert len(rows) == 2 * 12 * 3
    right = [row for row in rows if row["figure"] == "tokens_right" and row["probe"] == "copy(block=8)"]
    assert [float(row["chance"]) for row in right] == [1 / 397] * 16
    assert [bool(row["above_dense_estimate"]) for row in right] == [False] * 8 + [True] * 8
    text = probe_table(figures)
    assert "copy(block=8): share of answer tokens that are right, by distance" in text
    assert f"{result.runs[1].title}: density 100.0%, 2 layers, 48 calls torch/" in text
    assert sorted(probe_pictures(figures)) == ["copy_block_8.png", "passkey.png"]


def test_runs_with_and_without_an_adapter(tiny_model, tiny_tokenizer):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_model, config)
    result = probe(
        model, tiny_tokenizer, ["passkey"], patterns=["streaming_llm"], without_adapter=True, **SMALL
    )
    titles = [run.title for run in result.runs]
    assert titles[0] == "dense" and titles[2] == "dense + adapter" and len(titles) == 4
    assert result.dense_of(result.runs[3]) is result.runs[2]
    assert (result.runs[0].nats != result.runs[2].nats).all()


def test_a_run_without_a_sparse_call_is_refused(tiny_model, tiny_tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(variants, "patched", lambda *args, **kwargs: nullcontext())
    with pytest.raises(ValueError, match="no attention call of LlamaForCausalLM went through"):
        probe(tiny_model, tiny_tokenizer, ["passkey"], patterns=["sliding_window"], output=tmp_path, **SMALL)
    rows = [json.loads(line) for line in (tmp_path / "probe_samples.jsonl").read_text().splitlines()]
    assert {row["run"] for row in rows} == {"dense"}  # no dense figure was written down as a pattern's


def test_chances(tiny_tokenizer):
    material = Material.of(tiny_tokenizer, None, 100)
    found = [
        one.chance(material)
        for one in (
            Passkey(digits=3),
            Needle(digits=1),
            NeedleMultikey(keys=5),
            Variables(ask="value", chains=4),
        )
    ]
    assert found == [1 / 900, 1 / 9, 1 / 5, 1 / 4]
    assert Variables().chance(material) is None and Copy().chance(material) == 1 / 397


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": ["passkeys"]}, "unknown probe 'passkeys'. Did you mean 'passkey'"),
        ({"probes": []}, "there is no probe to measure"),
        ({"probes": ["copy", Copy()]}, "the probe copy is given twice"),
        ({"lengths": [10]}, r"length=10 is too short for passkey, whose own words take \d\d tokens"),
        ({"lengths": []}, "there is no length"),
        ({"lengths": [100, 100]}, "the length 100 is given twice"),
        ({"lengths": [0]}, "must be a whole number of tokens >= 1, got 0"),
        ({"depths": [0.5, 1.5]}, r"a depth must lie between 0 .*, got 1.5"),
        ({"depths": [float("nan")]}, "a depth must lie between 0 .*, got nan"),
        ({"samples": 0}, "samples must be a whole number >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"prefill_chunk": 0}, "prefill_chunk must be a whole number >= 1, got 0"),
        ({"probes": ["copy"], "distances": [31]}, "a distance of 31 does not fit copy in length=150; .* 32 .* to 117"),
        ({"probes": ["copy"], "distances": [float("nan")]}, "a distance must be a whole number of tokens, got nan"),
        ({"probes": ["copy"], "distances": [118]}, "a distance of 118 does not fit copy"),
        ({"probes": ["copy"], "lengths": [64]}, "too short for copy, whose block and its copy take 65 tokens"),
        ({"probes": [Copy(block=398)], "lengths": [900]}, r"397 ordinary tokens, and copy\(block=398\) needs 398"),
        ({"haystack": []}, "the haystack holds no text"),
        ({"patterns": ["sliding_widow"]}, "Did you mean 'sliding_window'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_before_anything_runs(options, message, tiny_model, tiny_tokenizer):
    tiny_model.forward = lambda *args, **kwargs: pytest.fail("the model ran")
    arguments = {"probes": ["passkey"], "lengths": [150], "samples": 2, **options}
    with pytest.raises(ValueError, match=message):
        probe(tiny_model, tiny_tokenizer, **arguments)


def test_models_that_cannot_be_asked(tiny_model, tiny_tokenizer):
    short = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="length=150 is beyond the 64 positions of GPT2LMHeadModel"):
        probe(short, tiny_tokenizer, ["passkey"], **SMALL)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertForMaskedLM(BertConfig(vocab_size=400, **small))
    with pytest.raises(ValueError, match="BertForMaskedLM predicts masked tokens"):
        probe(encoder, tiny_tokenizer, ["passkey"], **SMALL)
    tiny_model.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="knows only 0 to 99"):
        probe(tiny_model, tiny_tokenizer, ["passkey"], **SMALL)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Passkey(wording="poem"), "wording must be 'code' or 'prose', got 'poem'"),
        (lambda: Passkey(digits=0), "digits must be a whole number from 1 to 18, got 0"),
        (lambda: NeedleMultikey(keys=1), "keys must be a whole number from 2 to 100, got 1"),
        (lambda: NeedleMultikey(keys=10, digits=1), "from 2 to 9, got 10"),
        (lambda: Needle(values="words"), "values must be 'numbers' or 'uuids'"),
        (lambda: Variables(hops=0), "hops must be"),
        (lambda: Copy(block=1), "block must be"),
        (lambda: Copy(between="nothing"), "between must be 'haystack' or 'random'"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_probe_is_known_by_its_name():
    assert list(PROBES) == ["passkey", "needle", "needle_multikey", "variables", "copy"]
    assert str(Passkey()) == "passkey" and str(Copy(block=8)) == "copy(block=8)"

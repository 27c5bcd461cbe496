"""Models whose perplexity is known: a bigram chain, and encoders scored one masked token at a time."""

import copy
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

import hf_sparse
from hf_sparse.evaluate import difference, perplexity

STATES = 24


@pytest.fixture
def chain():
    """Transition probabilities [from, to]; state 0 is where every document begins and is never gone back to."""
    draw = np.random.default_rng(5)
    found = draw.dirichlet(np.full(STATES, 0.3), size=STATES) + 1e-4
    found[:, 0] = 0
    return found / found.sum(axis=1, keepdims=True)


@pytest.fixture
def bigram_tokenizer():
    vocabulary = {"<s>": 0, **{f"w{i}": i for i in range(1, STATES)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def bigram_model(chain):
    """A Llama that says log P(next | last token), whatever came before: its layers add nothing."""
    config = LlamaConfig(
        vocab_size=STATES,
        hidden_size=STATES,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
        bos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            weight.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(STATES))
        # the norm makes each unit vector sqrt(STATES) long
        model.lm_head.weight.copy_(torch.tensor(np.log(chain + 1e-30)).T / math.sqrt(STATES))
    return model


def test_a_bigram_chain_has_its_entropy(chain, bigram_tokenizer):
    draw = np.random.default_rng(0)
    texts = []
    for _ in range(40):
        state, words = 0, []
        for _ in range(int(draw.integers(200, 800))):
            state = draw.choice(STATES, p=chain[state])
            words.append(f"w{state}")
        texts.append(" ".join(words))
    stationary = np.linalg.matrix_power(chain, 200)[1]
    row_entropies = -np.where(chain > 0, chain * np.log(np.maximum(chain, 1e-300)), 0).sum(axis=1)
    entropy = float(stationary @ row_entropies)
    result = perplexity(
        bigram_model(chain), bigram_tokenizer, texts, max_length=4096, patterns=["sliding_window"]
    )
    for run in result.runs:
        above = difference(run.nats, entropy * result.tokens, result.tokens)
        assert above.low < 0 < above.high
        assert above.high - above.low < 0.1 * entropy  # or anything would do
        assert result.perplexity(run) == pytest.approx(math.exp(entropy), rel=0.05)


SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "initializer_range": 0.3,
    "pad_token_id": 2,
}
ENCODERS = {
    BertForMaskedLM: BertConfig(**SMALL),
    RobertaForMaskedLM: RobertaConfig(**SMALL),
    ModernBertForMaskedLM: ModernBertConfig(
        **SMALL, bos_token_id=0, eos_token_id=1, cls_token_id=0, sep_token_id=1
    ),
}


@pytest.fixture
def encoder_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token = "<s>", "</s>", "!"
    return tokenizer


TEXTS = [
    "def f(a, b):\n    return a + b\n" * 4,
    "import os\nprint(os.sep)\n" * 2,
    "x = {1: 'a', 2: 'b'}\n" * 30,
]


@pytest.mark.parametrize("architecture", ENCODERS, ids=lambda architecture: architecture.__name__)
def test_an_encoder_is_scored_one_masked_token_at_a_time(architecture, encoder_tokenizer):
    torch.manual_seed(0)
    model = architecture(ENCODERS[architecture]).eval()
    window = hf_sparse.SlidingWindow(window=4)
    result = perplexity(
        model, encoder_tokenizer, TEXTS[:2], max_length=60, patterns=[window], mask_share=1e-6, batch_size=9
    )
    assert result.config["measure"] == "pseudo-log-likelihood"
    for run, pattern in zip(result.runs, ("full", window), strict=True):
        with hf_sparse.patched(model, pattern), torch.no_grad():
            for i, text in enumerate(TEXTS[:2]):
                ids = encoder_tokenizer(text, add_special_tokens=False)["input_ids"][:58]
                assert result.tokens[i] == len(ids)
                total = 0.0
                for place, token in enumerate(ids):
                    fed = [0, *ids, 1]
                    fed[place + 1] = encoder_tokenizer.mask_token_id
                    logits = model(torch.tensor([fed])).logits[0, place + 1].double()
                    total -= logits.log_softmax(-1)[token].item()
                assert run.nats[i] == pytest.approx(total, rel=1e-5)
    assert result.runs[1].density < 0.5 and result.runs[1].calls > 0


def test_masks_are_the_same_for_every_run_and_batch(encoder_tokenizer):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SMALL)).eval()

    def nats(**settings):
        result = perplexity(
            model, encoder_tokenizer, TEXTS, max_length=64, patterns=["full"], mode="rolling", **settings
        )
        return result.runs[0].nats, result.runs[1].nats

    dense, full = nats()
    assert full == pytest.approx(dense, rel=1e-5)
    assert nats(batch_size=3, head_chunk=2)[0] == pytest.approx(dense, rel=1e-6)
    assert abs(nats(mask_share=0.5)[0] - dense).min() > 1e-3
    assert abs(nats(seed=1)[0] - dense).min() > 1e-4


def test_an_encoder_refuses_what_it_cannot_do(encoder_tokenizer, tiny_tokenizer):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match=r"mode='strided' is for causal models"):
        perplexity(model, encoder_tokenizer, TEXTS, max_length=64, mode="strided")
    for settings, message in (
        ({"bos": False}, r"bos=False is for causal models, this is an encoder"),
        ({"bos_each_window": True}, r"bos_each_window=True is for causal models"),
        ({"max_length": 4}, r"max_length=4 leaves too little room .* use max_length=5 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            perplexity(model, encoder_tokenizer, TEXTS, **{"max_length": 64, **settings})
    assert perplexity(model, encoder_tokenizer, TEXTS[:1], max_length=5).tokens[0] == 3
    small = BertForMaskedLM(BertConfig(**{**SMALL, "vocab_size": 399})).eval()
    outside = copy.deepcopy(encoder_tokenizer)
    outside.mask_token = outside.convert_ids_to_tokens(399)
    with pytest.raises(
        ValueError, match=r"the tokenizer gives the token 399, but BertForMaskedLM knows only"
    ):
        perplexity(small, outside, ["import os " * 9], max_length=64)
    with pytest.raises(ValueError, match=r"has no mask token"):
        perplexity(model, tiny_tokenizer, TEXTS, max_length=64)
    with pytest.raises(ValueError, match=r"max_length=131 is beyond the 130 positions"):
        perplexity(model, encoder_tokenizer, TEXTS, max_length=131)
    roberta = RobertaForMaskedLM(RobertaConfig(**SMALL)).eval()  # positions begin behind the padding's, 2
    with pytest.raises(ValueError, match=r"max_length=128 is beyond the 127 positions"):
        perplexity(roberta, encoder_tokenizer, TEXTS, max_length=128)
    assert perplexity(roberta, encoder_tokenizer, TEXTS[2:], max_length=127).tokens[0] == 125

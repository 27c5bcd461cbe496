"""report.html: whole, self-contained, escaped."""

import argparse
import base64
import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import pytest

import hf_sparse
from hf_sparse.documents import Document
from hf_sparse.evaluate import Section, perplexity, save_results

pytest.importorskip("matplotlib")
SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
EVIL = "<script>alert(1)</script>\"'&\ud7ff.py"
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Every tag with its attributes, the text, and whether tags are closed in order."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.text, self.open, self.cells = [], [], [], []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def result(tiny_model, tiny_tokenizer):
    documents = [Document(f"{EVIL} {i}", SOURCE[i * 900 : i * 900 + 400]) for i in range(6)]
    found = perplexity(
        tiny_model,
        tiny_tokenizer,
        [*documents, Document("<b>empty", "")],
        max_length=60,
        patterns=[hf_sparse.SlidingWindow(window=6)],
        contexts=(20, 50),
        context_targets=8,
    )
    return dataclasses.replace(found, config={**found.config, "model": "a/<i>model"})


def page_of(result, folder, **options):
    save_results(result, folder, html=True, **options)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else_and_escapes_what_it_is_given(result, tmp_path):
    section = Section("probe <x>", [("<th>", "accuracy"), ("<u>", "0.5")], [b"\x89PNG probe"])
    page = page_of(result, tmp_path, command="hf-sparse eval 'a' && <b>", sections=[section])
    assert not page.open, "a tag is not closed"
    assert not {"script", "link", "iframe", "object", "i", "b", "u"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    images = page.named("img")
    assert [image["alt"] for image in images] == [
        "loss by position",
        "perplexity by context",
        "quality against speed",
        "probe <x>",
    ]
    contents = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in images]
    assert all(content.startswith(b"\x89PNG") for content in contents)
    (policy,) = [each["content"] for each in page.named("meta") if "http-equiv" in each]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    text = "".join(page.text)
    for given in (f"{EVIL} 0", "<b>empty: no text", "a/<i>model", "hf-sparse eval 'a' && <b>", "probe <x>"):
        assert given in text
    assert ["<u>", "0.5"] in page.cells
    assert "color-scheme: light dark" in text and "http" not in text.replace("http-equiv", "")


def test_the_page_has_every_document_and_the_proof(result, tmp_path):
    page = page_of(result, tmp_path)
    dense, sparse = result.runs
    assert len(page.named("details")) == 2
    for i, document in enumerate(result.text.documents):
        nats = dense.nats[i] / document.tokens
        more = (sparse.nats[i] - dense.nats[i]) / document.tokens
        assert [document.name, f"{document.tokens}", f"{nats:.4f}", f"{more:+.4f}"] in page.cells
    ran = ", ".join(f"{name} {count:,}" for name, count in sparse.ran.items())
    assert ["sliding_window(window=6)", "2", "12", ran, f"{sparse.density:.4%}"] in page.cells
    headline = next(row for row in page.cells if row[0] == sparse.title)
    assert headline[1] == f"{result.perplexity(sparse):.3f}"
    assert str(result.difference(sparse, dense)) in headline
    assert ["max_length", "60"] in page.cells and [
        "versions.torch",
        result.machine["versions"]["torch"],
    ] in page.cells
    text = "".join(page.text)
    assert "in one pass, cut to 60 tokens" in text and "bootstrap draws of whole documents" in text
    assert result.text.fingerprint in text


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"mode": "strided", "stride": 20}, "in windows of 60 tokens, 20 apart"),
        ({"mode": "rolling"}, "in disjoint windows of 60 tokens"),
        ({"bos": False}, "from its second token on"),
    ],
)
def test_the_method_is_told_as_it_was(tiny_model, tiny_tokenizer, tmp_path, method, words):
    result = perplexity(tiny_model, tiny_tokenizer, [SOURCE[:400]], max_length=60, **method)
    text = "".join(page_of(result, tmp_path).text)
    assert words in text and "No pattern was measured" in text and "bootstrap" not in text
    result = perplexity(
        tiny_model, tiny_tokenizer, [SOURCE[:400]], max_length=60, patterns=["strided"], **method
    )
    assert "bootstrap draws of blocks of 2,048 tokens" in "".join(page_of(result, tmp_path).text)


def test_without_dense_attention_the_page_does_not_speak_of_it(tiny_model, tiny_tokenizer, tmp_path):
    patterns = [hf_sparse.SlidingWindow(6), hf_sparse.SlidingWindow(9)]
    texts = [SOURCE[i * 900 : i * 900 + 400] for i in range(6)]
    result = perplexity(tiny_model, tiny_tokenizer, texts, max_length=60, patterns=patterns, dense=False)
    page = page_of(result, tmp_path)
    text = "".join(page.text)
    assert "All patterns score the same tokens" in text and "6 documents: nats/token of every run" in text
    assert "Dense attention" not in text and "bootstrap" not in text
    assert [image["alt"] for image in page.named("img")] == ["loss by position"]

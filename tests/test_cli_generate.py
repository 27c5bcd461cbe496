"""hf-sparse generate: what it streams, on which cache, and how a dialogue goes on."""

import io
import re
import signal
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_sparse
from hf_sparse.cli import dialogue, main, running_text
from hf_sparse.cli.dialogue import new_turn
from hf_sparse.cli.running_text import RunningText, Writing

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of libraries, about each other

PATTERN = ("--pattern", "streaming_llm", "--sinks", "2", "--window", "10")
TEXT = "import os\n\ndef main(argv):\n    return os.path.join(argv[0], argv[1])\n"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def run(capsys, *arguments):
    """Run the command, which must succeed; return stdout and stderr."""
    assert main(["generate", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr()


def goes_on(folder, ids, count, positions="cache"):
    """The tokens with those that the model writes after them when every step is computed anew, without a cache."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    hf_sparse.patch_model(model, "streaming_llm", sinks=2, window=10, positions=positions)
    end = len(ids) + count
    with torch.no_grad():
        while len(ids) < end and ids[-1] != 1:
            ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids


def expected(folder, text, count, positions="cache"):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [0, *tokenizer(text)["input_ids"]]
    written = goes_on(folder, ids, count, positions)[len(ids) :]
    return tokenizer.decode(written, skip_special_tokens=True) + "\n"


@pytest.fixture
def piped(monkeypatch):
    """Give text on standard input."""

    def pipe(text: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))

    return pipe


@pytest.fixture
def typed(monkeypatch):
    """Type lines in a terminal, then Ctrl-D."""

    def type_(*lines):
        left = list(lines)

        def read():
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    return type_


@pytest.fixture
def texts_run(monkeypatch):
    """Every RunningText of a command, to look at afterwards."""
    made = []
    init = RunningText.__init__

    def note(self, *args):
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(RunningText, "__init__", note)
    return made


@pytest.mark.parametrize("cache", running_text.CACHES)
def test_it_streams_what_the_model_writes_with_places_in_the_cache(tiny_model_folder, cache, capsys):
    text = 5 * TEXT
    out, err = run(
        capsys, tiny_model_folder, *PATTERN, "--prompt", text, "--max-new-tokens", 30, "--cache", cache
    )
    assert out == expected(tiny_model_folder, text, 30)
    assert out != expected(tiny_model_folder, text, 30, positions="absolute"), "the test could not tell"
    read = len(AutoTokenizer.from_pretrained(tiny_model_folder)(text)["input_ids"]) + 1
    assert err.startswith(f"{read} tokens read in ") and "30 written at" in err
    size, kept, seen = re.search(r"cache ([\d.]+) MiB, ([\d,]+) of ([\d,]+) tokens kept", err).groups()
    assert int(seen) == read + 29, "nothing has read the newest token"
    token = 2 * 2 * 2 * 8 * 4  # bytes: keys and values, layers, heads, size of a head, float32
    slots = {"sparse": 2 + 9 + 128, "dynamic": read + 29, "static": read + 30}[cache]
    assert abs(float(size) - slots * token / 2**20) < 0.005 + 2 * token / 2**20
    assert int(kept) <= slots if cache == "sparse" else kept == seen


def test_positions_are_those_given(tiny_model_folder, capsys):
    arguments = (*PATTERN, "--positions", "absolute", "--prompt", TEXT, "--max-new-tokens", 30)
    out, _ = run(capsys, tiny_model_folder, *arguments)
    assert out == expected(tiny_model_folder, TEXT, 30, positions="absolute")


def test_the_prompt_comes_from_a_file_or_a_pipe_and_may_be_read_in_chunks(
    tiny_model_folder, tmp_path, piped, capsys
):
    wanted = expected(tiny_model_folder, TEXT, 12)
    (tmp_path / "prompt.txt").write_text(TEXT, encoding="utf-8")
    common = (tiny_model_folder, *PATTERN, "--max-new-tokens", 12, "--quiet")
    assert run(capsys, *common, "--file", tmp_path / "prompt.txt") == (wanted, "")
    piped(TEXT.encode())
    assert run(capsys, *common, "--prefill-chunk", 5) == (wanted, "")


def test_sampling_hangs_on_the_seed(tiny_model_folder, capsys):
    def sample(*arguments):
        command = (tiny_model_folder, *PATTERN, "--prompt", TEXT, "--max-new-tokens", 20, "--quiet")
        return run(capsys, *command, *arguments).out

    assert sample("--seed", 1) == sample("--seed", 1) != sample("--seed", 2)
    assert sample("--seed", 1, "--top-k", 1) == sample("--temperature", 1e-4) == sample()
    assert sample("--top-p", 1e-6) == sample()


def test_a_saved_pattern_is_run_and_an_adapter_with_its_own(
    adapter_folder, tiny_model_folder, capsys, texts_run
):
    common = ("--prompt", TEXT, "--max-new-tokens", 3)
    run(capsys, adapter_folder, *common)
    run(capsys, tiny_model_folder, "--adapter", adapter_folder, *common)
    run(capsys, adapter_folder, "--pattern", "full", *common)
    patterns = [text.cache.settings.pattern for text in texts_run]
    assert patterns == [hf_sparse.SlidingWindow(8)] * 2 + [hf_sparse.Full()]
    assert all(hasattr(text.model, "disable_adapter") for text in texts_run)


def test_stats_come_while_the_text_is_written(tiny_model_folder, capsys, monkeypatch):
    monkeypatch.setattr("hf_sparse.cli.meter.EVERY", 0.0)
    common = (tiny_model_folder, *PATTERN, "--prompt", TEXT, "--max-new-tokens", 5)
    lines = run(capsys, *common, "--stats").err.splitlines()
    assert [line.split()[0] for line in lines[-5:-1]] == ["2", "3", "4", "5"]
    assert "tokens read" in lines[-1]
    monkeypatch.setattr("hf_sparse.cli.meter.REFRESH", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    err = run(capsys, *common).err
    assert err.count("\n") == 1 and err.count("\r") >= 5, "one line, written over"


def test_a_dialogue_reads_of_every_turn_only_what_is_new(tiny_model_folder, typed, capsys, texts_run):
    typed(TEXT, "", "and more", "again", "/exit", "never read")
    out, err = run(capsys, tiny_model_folder, *PATTERN, "--max-new-tokens", 9)
    (text,) = texts_run
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    added = [[0, *tokenizer(TEXT)["input_ids"]]]
    added += [tokenizer(f"\n{line}")["input_ids"] for line in ("and more", "again")]
    ids = []
    for turn in added:
        ids = goes_on(tiny_model_folder, ids + turn, 9)
        ids = ids[:-1] if ids[-1] == 1 else ids
    assert text.ids == ids, "as if there were no cache"
    read = [int(n) for n in re.findall(r"([\d,]+) tokens read", err)]
    # The newest token of an answer is read with the next turn, unless it was the one that ends answers.
    assert len(read) == 3 and all(n - len(turn) in (0, 1) for n, turn in zip(read, added, strict=True))
    assert out.endswith(tokenizer.decode(ids[-3:]) + "\n")


def test_the_token_that_ends_an_answer_is_no_part_of_the_text(tiny_model_folder, typed, capsys, texts_run):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    ids = [0, *tokenizer(TEXT)["input_ids"]]
    answer = goes_on(tiny_model_folder, ids, 9)[len(ids) :]
    end = next(token for token in answer[3:] if token not in answer[:3])
    GenerationConfig(eos_token_id=[1, end]).save_pretrained(tiny_model_folder)
    typed(TEXT)
    run(capsys, tiny_model_folder, *PATTERN, "--max-new-tokens", 9)
    (text,) = texts_run
    assert text.ids == ids + answer[: answer.index(end)]
    assert text.cache.get_seq_length() == len(text.ids), "nothing of it is left to be read"


def test_the_first_interrupt_ends_an_answer_and_the_dialogue_goes_on(
    tiny_model_folder, typed, capsys, texts_run, monkeypatch
):
    interrupt_at(monkeypatch, tokens=[4])
    typed(TEXT, "and more")
    before = signal.getsignal(signal.SIGINT)
    _, err = run(capsys, tiny_model_folder, *PATTERN, "--max-new-tokens", 12)
    (text,) = texts_run
    assert "stopped: the dialogue goes on" in err
    assert int(re.findall(r"(\d+) written", err)[0]) <= 5, "generate hands a token out one step later"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    turn = len(tokenizer("\nand more")["input_ids"])
    assert int(re.findall(r"(\d+) tokens read", err)[1]) in (turn, turn + 1), "the cache was kept"
    assert "and more" in tokenizer.decode(text.ids)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_interrupt_drops_the_turn_and_a_new_cache_reads_the_rest(
    tiny_model_folder, typed, capsys, texts_run, monkeypatch
):
    typed(TEXT, "dropped", "and more")
    interrupt_at(monkeypatch, tokens=[12 + 3, 12 + 3])  # both within the second answer
    _, err = run(capsys, tiny_model_folder, *PATTERN, "--max-new-tokens", 12)
    (text,) = texts_run
    written = AutoTokenizer.from_pretrained(tiny_model_folder).decode(text.ids)
    assert "question and answer are dropped" in err
    assert "dropped" not in written and "and more" in written
    assert len(text.ids) - text.cache.get_seq_length() in (0, 1)
    assert int(re.findall(r"(\d+) tokens read", err)[-1]) > 30, "all of it"


def interrupt_at(monkeypatch, tokens):
    """Press Ctrl-C as often as a token of all answers is listed, when it has been written."""
    put, count = running_text.Meter.put, [0]

    def counted(self, value):
        is_prompt = self.next_tokens_are_prompt
        put(self, value)
        if not is_prompt:
            count[0] += 1
            for _ in range(tokens.count(count[0])):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(running_text.Meter, "put", counted)


def test_turns_in_a_chat_template_join_to_the_whole_dialogue(tiny_model, tiny_tokenizer):
    hf_sparse.patch_model(tiny_model, "streaming_llm", sinks=2, window=10)
    tokenizer = tiny_tokenizer.__class__(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = TEMPLATE
    text = RunningText(tiny_model, tokenizer, Writing({"max_new_tokens": 4, "do_sample": False}, quiet=True))
    ids = []
    for line in ("one", "two"):
        turn = new_turn(text, line)
        ids = ids + turn + tokenizer("answer")["input_ids"]
        text.ids = list(ids)
    assert tokenizer.decode(ids) == "<s>[user]one</s>[assistant]answer</s>[user]two</s>[assistant]answer"
    for template, words in {
        "{{ messages[-1]['content'] }}": "leaves earlier answers out",
        "{{ raise_exception('users only') }}": "fails .users only.",
    }.items():
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=words):
            new_turn(text, "three")


def test_an_empty_prompt_is_bos(tiny_model_folder, capsys):
    arguments = (tiny_model_folder, *PATTERN, "--prompt", "", "--max-new-tokens", 4, "--quiet")
    assert run(capsys, *arguments).out == expected(tiny_model_folder, "", 4)


def test_leaving_is_the_word_that_is_shown(capsys, typed):
    typed(dialogue.LEAVE)
    dialogue.talk(None)
    assert f"{dialogue.LEAVE} or Ctrl-D ends" in capsys.readouterr().err

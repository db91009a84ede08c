"""nvtier.train's examples: what of a conversation is learned, sources, order; and its learning rates."""

import csv
import json
import math
import os

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
pytest.importorskip("yaml")

import nvtier
from nvtier.train import _config, _data, _schedule, _sources
from nvtier.train._yaml import Problems


@pytest.fixture(scope="module")
def tokenizer():
    folder = os.environ.get("NVTIER_MODEL")
    if not folder:
        pytest.skip("NVTIER_MODEL is not set: run this through `cargo xtask test`")
    return hf.AutoTokenizer.from_pretrained(os.path.join(folder, "snapshot"))


@pytest.fixture
def load(tmp_path, monkeypatch, tokenizer):
    """Data of rows and a data set's YAML."""
    monkeypatch.chdir(tmp_path)

    def load(rows, text, max_seq_len=512, tokens=None):
        with open("data.json", "w") as file:
            json.dump(rows, file)
        with open("set.yaml", "w") as file:
            file.write("s:\n  data_path: data.json\n" + "".join(f"  {line}\n" for line in text.splitlines()))
        problems = Problems()
        sets = _config._read_datasets("set.yaml", problems)
        problems.settle()
        return _data.Data(sets, tokens or tokenizer, max_seq_len)

    return load


def learned(data, tokenizer, index=0):
    """What is learned of an example, as text, and all of it."""
    example = data.examples[index]
    return tokenizer.decode([id for id, is_learned in zip(example.ids, example.learned) if is_learned]), tokenizer.decode(list(example.ids))


QA = "strategy: qa\nquestion_key: q\nanswer_key: a\nlabel_key: a"


def test_of_a_question_only_the_answer_is_learned(load, tokenizer):
    data = load([{"q": "How many?", "a": "Four <b>of</b> them."}], QA + "\nsystem_prompt: Be brief.\nuser_prompt: 'Say: {question} {x}'")
    answer, whole = learned(data, tokenizer)
    assert answer == "Four <b>of</b> them.<|im_end|>\n"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say: How many? {x}"},
        {"role": "assistant", "content": "Four <b>of</b> them."},
    ]
    assert whole == tokenizer.apply_chat_template(messages, tokenize=False)
    # And nothing was tokenized in another way than as a whole.
    assert list(data.examples[0].ids) == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    batch = data.batch([0])
    kept = batch["labels"][0] != _data.IGNORED
    assert torch.equal(batch["labels"][0][kept], batch["input_ids"][0][kept]) and 0 < int(kept.sum()) < kept.numel() / 2


def test_conversations_of_several_turns(load, tokenizer):
    text = "strategy: qa\nquestion_key: [q1, q2]\nanswer_key: [a1, a2]"
    rows = [{"q1": "One?", "a1": "1", "q2": "Two?", "a2": "2"}, {"q1": "Only?", "a1": "yes", "q2": None, "a2": ""}, {"q1": "Short?", "a1": "yes"}]
    data = load(rows, text)
    assert learned(data, tokenizer)[0] == "1<|im_end|>\n2<|im_end|>\n"
    assert learned(data, tokenizer, 1)[0] == learned(data, tokenizer, 2)[0] == "yes<|im_end|>\n"
    # The same as lists below one key, and as messages.
    lists = load([{"q": ["One?", "Two?"], "a": ["1", "2"]}], QA)
    turns = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    messages = load([{"m": [{"role": role, "content": content} for role, content in turns]}], "strategy: qa\nmessage_key: m")
    assert data.examples[0] == lists.examples[0] == messages.examples[0]
    with pytest.raises(nvtier.InvalidArgument, match="data.json: row 0: turn 2 of the conversation"):
        load([{"q1": "One?", "a1": "1", "q2": "Two?"}], text)
    with pytest.raises(nvtier.InvalidArgument, match="row 0: q and a are not lists of as many"):
        load([{"q": ["One?", "Two?"], "a": ["1"]}], QA)
    with pytest.raises(nvtier.InvalidArgument, match="no message of the role assistant"):
        load([{"m": [{"role": "user", "content": "x"}]}], "strategy: qa\nmessage_key: m")


def test_what_was_retrieved_goes_where_the_prompt_says(load, tokenizer):
    text = "strategy: rag\nuser_prompt: '{rag} | {question}'\nquestion_key: q\nanswer_key: a\nrag_key: context.sentences"
    data = load([{"q": "Which {rag}?", "a": "x", "context": {"sentences": [["one {question}", "two"], "three"]}}], text)
    answer, whole = learned(data, tokenizer)
    assert answer == "x<|im_end|>\n" and "one {question}\ntwo\nthree | Which {rag}?<|im_end|>" in whole
    # Below lists of objects, and a key that has a dot itself.
    data = load([{"q": "Q", "a": "x", "context": [{"sentences": "one"}, {"sentences": "two"}]}], text)
    assert "one\ntwo | Q" in learned(data, tokenizer)[1]
    data = load([{"q": "Q", "a": "x", "context.sentences": "flat"}], text)
    assert "flat | Q" in learned(data, tokenizer)[1]


def test_of_plain_text_everything_is_learned_in_pieces(load, tokenizer):
    words = "The quick brown fox jumps over the lazy dog. " * 20
    data = load([{"t": words}, {"t": "Short."}], "strategy: pretrain\ntext: t", max_seq_len=64)
    ids = tokenizer(words, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert [id for example in data.examples[:-1] for id in example.ids] == ids and len(data) == -(-len(ids) // 64) + 1
    assert all(all(example.learned) and len(example.ids) <= 64 for example in data.examples)


def test_a_tokenizer_without_a_template(load, tokenizer):
    bare = hf.AutoTokenizer.from_pretrained(os.path.join(os.environ["NVTIER_MODEL"], "snapshot"))
    bare.chat_template = None
    data = load([{"q": "How many?", "a": "Four."}], QA + "\nsystem_prompt: Be brief.", tokens=bare)
    answer, whole = learned(data, bare)
    assert answer == "Four." + bare.eos_token and whole.endswith("Be brief.\n\nHow many?\n\nFour." + bare.eos_token)


def test_a_template_that_rewrites_answers_is_refused(load, tokenizer):
    odd = hf.AutoTokenizer.from_pretrained(os.path.join(os.environ["NVTIER_MODEL"], "snapshot"))
    odd.chat_template = "{% for m in messages %}{{ m.content if loop.last else m.content[:1] }}|{% endfor %}"
    load([{"q": "Q", "a": "Answer"}], QA, tokens=odd)
    with pytest.raises(nvtier.NotSupported, match="row 0: the tokenizer's chat template writes an answer in another way"):
        load([{"q": ["Q", "R"], "a": ["Answer", "B"]}], QA, tokens=odd)
    odd.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(nvtier.InvalidArgument, match="row 0: the tokenizer's chat template refuses the conversation: no system here"):
        load([{"q": "Q", "a": "A"}], QA, tokens=odd)


def test_long_examples_are_cut_and_empty_ones_left_out(load):
    rows = [{"q": "Q", "a": "word " * 200}, {"q": "word " * 200, "a": "A"}, {"q": "Q", "a": "A"}]
    data = load(rows, QA, max_seq_len=64)
    assert (len(data), data.cut, data.left_out) == (2, 2, 1) and max(len(example.ids) for example in data.examples) == 64
    with pytest.raises(nvtier.InvalidArgument, match="set.yaml:2: s.data_path: data.json gives no example to learn from"):
        load(rows[1:2], QA, max_seq_len=64)
    with pytest.raises(nvtier.InvalidArgument, match="gives no example"):
        load([], QA)


def test_batches_are_filled_up_and_not_learned_there(load, tokenizer):
    data = load([{"q": "Q", "a": "A"}, {"q": "A longer question?", "a": "And a longer answer."}], QA)
    batch = data.batch([0, 1])
    short = len(data.examples[0].ids)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() == [len(example.ids) for example in data.examples]
    assert (batch["labels"][0, short:] == _data.IGNORED).all() and (batch["input_ids"][0, short:] == tokenizer.eos_token_id).all()


@pytest.mark.parametrize(
    "rows, text, said",
    [
        ([{"q": "Q", "b": "A"}], QA, "data.json: row 0: there is no key `a`, it has q, b"),
        ([{"q": "Q", "a": "A"}, {"q": None, "a": "A"}], QA, "data.json: row 1: `q` must be text, not nothing"),
        ([{"q": "Q", "a": {"x": 1}}], QA, "row 0: `a` must be text, not dict"),
        ([{"t": []}], "strategy: pretrain\ntext: t", "`t` must be text, not list"),
        ([["x"]], QA, "row 0 is no object"),
        (3, QA, "it must be a list of objects"),
    ],
)
def test_rows_that_cannot_be_used_are_named(load, rows, text, said):
    with pytest.raises(nvtier.Error) as caught:
        load(rows, text)
    assert said in str(caught.value)


def test_the_fingerprint_knows_every_token(load):
    same = [load([{"q": "Q", "a": "A"}], QA).fingerprint for _ in range(2)]
    other = {load([{"q": "Q", "a": "B"}], QA).fingerprint, load([{"q": "Q", "a": "A"}] * 2, QA).fingerprint}
    assert same[0] == same[1] and len(other | set(same)) == 3


def test_files_and_folders(tmp_path):
    rows = [{"q": "ä", "a": "1"}, {"q": 'b "x", y', "a": "2"}]
    with open(tmp_path / "train-0.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["q", "a"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "train-1.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.csv").write_text("q,a\nnot,this\n")

    def read(name):
        return [row for _, row in _sources.rows(str(tmp_path / name), "set.yaml")]

    for name in ("train-0.csv", "train-1.jsonl", "wrapped.json", "lines.json"):
        assert read(name) == rows, name
    # Of a folder, what is there to train with.
    assert read("") == rows * 2
    assert [where.rsplit("/", 1)[1] for where, _ in _sources.rows(str(tmp_path), "")] == ["train-0.csv:2", "train-0.csv:3", "train-1.jsonl:1", "train-1.jsonl:2"]


@pytest.mark.parametrize(
    "name, content, kind, said",
    [
        ("a.json", "[{]", nvtier.Malformed, "a.json: "),
        ("a.jsonl", '{"a": 1}\n{"a"\n', nvtier.Malformed, "a.jsonl:2: "),
        ("a.csv", "a,b\n1\n", nvtier.Malformed, "a.csv:2: it has not as many columns"),
        ("a.json", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", nvtier.Malformed, "git lfs pull"),
        ("a.json", b"[\xff]", nvtier.Malformed, "not UTF-8"),
        ("a.txt", "x", nvtier.NotSupported, "files of data end with .json"),
        ("folder/a.txt", "x", nvtier.NotFound, "no file in it that ends with"),
    ],
)
def test_files_that_hold_no_rows(tmp_path, name, content, kind, said):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind) as caught:
        list(_sources.rows(str(path.parent if "/" in name else path), ""))
    assert said in str(caught.value)


def test_what_needs_packages_says_which(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    try:
        import pyarrow  # noqa: F401

        expected = pytest.raises(nvtier.Malformed)
    except ImportError:
        expected = pytest.raises(nvtier.NotSupported, match="pip install pyarrow")
    with expected:
        list(_sources.rows(str(tmp_path / "a.parquet"), ""))
    try:
        import datasets  # noqa: F401
    except ImportError:
        with pytest.raises(nvtier.NotFound, match="Dahoas/rm-static: there is no such file or folder here; .* pip install datasets"):
            list(_sources.rows("Dahoas/rm-static", ""))
    with pytest.raises(nvtier.NotFound, match="gone/a.json: there is no such file"):
        list(_sources.rows("gone/a.json", ""))


def test_parquet_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: parquet files were not read")
    import pyarrow.parquet

    rows = [{"q": "a", "c": {"s": ["x", "y"]}}, {"q": "b", "c": {"s": []}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row for _, row in _sources.rows(str(tmp_path / "a.parquet"), "")] == rows


def test_the_order_follows_from_seed_and_epoch_and_can_be_gone_on_with():
    order = _data.Order(10, 3, seed=1)
    assert order.iterations == 4
    epochs = []
    for _ in range(2):
        epochs.append([order.take() for _ in range(order.iterations)])
        order.next_epoch()
    assert all(sorted(sum(epoch, [])) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    assert [len(batch) for batch in epochs[0]] == [3, 3, 3, 1]
    again = _data.Order(10, 3, seed=1)
    again.restore(json.loads(json.dumps({"epoch": 1, "iteration": 2})))
    assert [again.take(), again.take()] == epochs[1][2:]
    assert _data.Order(10, 3, seed=2).take() != epochs[0][0]
    assert _data.Order(10, 3, seed=1, max_iter=2).iterations == 2 and _data.Order(10, 3, seed=1, max_iter=9).iterations == 4


#: The rate before update n, for a rate of 1.
RATES = {
    -1: lambda n: 1.0,
    0: lambda n: 0.5 + 0.5 * min(n, 20) / 20,
    1: lambda n: (1 + math.cos(math.pi * n / 150)) / 2,
    2: lambda n: 0.99**n,
    3: lambda n: 0.95**n,
    4: lambda n: 0.1 ** (n // 30),
    5: lambda n: 0.1 ** ((n >= 30) + (n >= 80)),
}


@pytest.mark.parametrize("mode", RATES)
def test_learning_rates_and_going_on_with_them(mode):
    def make():
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, _schedule.make(mode, optimizer)

    optimizer, schedule = make()
    rates, saved = [], {}
    for update in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        saved[update] = json.dumps(_schedule.save(schedule, optimizer))
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([RATES[mode](n) for n in range(100)])
    for start in (0, 1, 19, 29, 30, 79):
        optimizer, schedule = make()
        _schedule.restore(json.loads(saved[start]), schedule, optimizer)
        for update in range(start, 100):
            assert optimizer.param_groups[0]["lr"] == rates[update], (start, update)
            optimizer.step()
            schedule.step()

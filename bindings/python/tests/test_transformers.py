"""nvtier.transformers: the same tokens with and without restore, for each family; whose blocks are never used for what."""

import ast
import contextlib
import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

import nvtier

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
hf.utils.logging.set_verbosity_error()

NEW = 12
SMALL = dict(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
FAMILIES = {
    "llama": (hf.LlamaConfig, {}),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 32}),
    "mistral": (hf.MistralConfig, {"sliding_window": None}),
    "mistral-sliding": (hf.MistralConfig, {"sliding_window": 24}),
    "gemma2": (hf.Gemma2Config, {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}),
    "gemma3": (hf.Gemma3TextConfig, {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16, "num_hidden_layers": 7}),
}


def tiny(family="llama", seed=0, **more):
    kind, own = FAMILIES[family]
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(kind(**{**SMALL, **own, **more}))
    for parameter in model.parameters():
        # The first tokens' differences are to be seen in what comes out.
        torch.nn.init.normal_(parameter, std=0.12) if parameter.dim() > 1 else None
    model.generation_config.eos_token_id = None
    return model.eval()


def prompts(count, length=100, shared=60, seed=1):
    """Prompts with a common beginning."""
    torch.manual_seed(seed)
    head = torch.randint(2, 500, (1, shared))
    return [torch.cat([head, torch.randint(2, 500, (1, length - shared))], dim=1) for _ in range(count)]


def plain(model, ids, new=NEW):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "pool"
    nvtier.format(path)
    return path


@pytest.fixture
def store(path):
    with nvtier.kv.Store(path, budget=128 << 20, ram=16 << 20) as store:
        yield store


def prefix_cache(model, store, **options):
    return nvtier.transformers.PrefixCache(model, store, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", ["load", "auto"])
def test_the_same_tokens_with_and_without_restore(family, plan, store):
    model = tiny(family)
    asked = prompts(4)
    expected = [plain(model, ids) for ids in asked]
    cache = prefix_cache(model, store, plan=plan)
    for index, (ids, tokens) in enumerate(zip(asked, expected)):
        assert torch.equal(cache.generate(ids, max_new_tokens=NEW, do_sample=False), tokens), cache.last
        # 60 tokens are common to all prompts.
        assert cache.last["stored_tokens"] == (0 if index == 0 else 48)
    # Another process would have nothing in memory.
    again = prefix_cache(model, store, plan=plan)
    space = again.namespace()
    for ids, tokens in zip(asked, expected):
        space.forget(again._keys(space, tokens[0].tolist()))
        assert torch.equal(again.generate(ids, max_new_tokens=NEW, do_sample=False), tokens)
        assert again.last["stored_tokens"] == 96
        assert again.last["loaded_tokens"] + again.last["computed_tokens"] == 99
        if plan == "load":
            assert again.last["loaded_tokens"] == 96 and again.last["saved_tokens"] == 0
    # A conversation goes on: what was generated is stored, too.
    longer = torch.cat([expected[0], torch.randint(2, 500, (1, 20))], dim=1)
    assert torch.equal(again.generate(longer, max_new_tokens=NEW, do_sample=False), plain(model, longer))
    assert again.last["stored_tokens"] == 96, "100 of the prompt and 11 whose keys were computed are 6 blocks"


def test_prompts_shorter_than_a_block_and_of_whole_blocks(store):
    model = tiny()
    cache = prefix_cache(model, store)
    for length in (1, 2, 15, 16, 17, 32, 33):
        ids = prompts(1, length=length, shared=1, seed=length)[0]
        expected = plain(model, ids)
        for _ in range(2):
            assert torch.equal(cache.generate(ids, max_new_tokens=NEW, do_sample=False), expected)
    assert cache.last["stored_tokens"] == 32


def test_beams_samples_and_outputs_of_other_kinds(store):
    model = tiny("gemma3")
    cache = prefix_cache(model, store)
    ids = prompts(1)[0]
    beams = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, num_beams=3, do_sample=False)
    for _ in range(2):
        assert torch.equal(cache.generate(ids, max_new_tokens=NEW, num_beams=3, do_sample=False), beams)
    assert cache.last["stored_tokens"] == 96
    output = cache.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(output.sequences, plain(model, ids))
    torch.manual_seed(3)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(cache.generate(ids, max_new_tokens=NEW, do_sample=True), expected)


def test_other_weights_under_the_same_path_never_hit(store, tmp_path):
    ids = prompts(1)[0]
    folder = tmp_path / "model"
    for seed in (0, 1):
        tiny(seed=seed).save_pretrained(folder)
        model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        cache = prefix_cache(model, store)
        assert torch.equal(cache.generate(ids, max_new_tokens=NEW, do_sample=False), plain(model, ids))
        assert cache.last["stored_tokens"] == 0
    # Training goes on while the cache is there.
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 0.5
    assert torch.equal(cache.generate(ids, max_new_tokens=NEW, do_sample=False), plain(model, ids))
    assert cache.last["stored_tokens"] == 0
    model.model.layers[1].mlp.up_proj.weight.data = model.model.layers[1].mlp.up_proj.weight.data * 1.5
    assert torch.equal(cache.generate(ids, max_new_tokens=NEW, do_sample=False), plain(model, ids))
    assert cache.last["stored_tokens"] == 0
    assert torch.equal(cache.generate(ids, max_new_tokens=NEW, do_sample=False), plain(model, ids))
    assert cache.last["stored_tokens"] == 96


class Tokenizer:
    """As much of a tokenizer as tells it from others."""

    def __init__(self, words, template):
        self.words, self.chat_template, self.special_tokens_map = words, template, {"bos_token": "<s>"}

    def get_vocab(self):
        return self.words


def test_tokenizers_templates_salts_types_and_attention_never_mix(store):
    ids = prompts(1)[0]
    model = tiny()
    seen = set()

    def fresh(cache):
        cache.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert cache.last["stored_tokens"] == 0
        seen.add(cache.namespace().fingerprint)

    fresh(prefix_cache(model, store))
    fresh(prefix_cache(model, store, tokenizer=Tokenizer({"a": 1}, "x")))
    fresh(prefix_cache(model, store, tokenizer=Tokenizer({"a": 2}, "x")))
    fresh(prefix_cache(model, store, tokenizer=Tokenizer({"a": 1}, "y")))
    fresh(prefix_cache(model, store, salt=b"picture"))
    fresh(prefix_cache(model, store, block_tokens=8))
    fresh(prefix_cache(tiny().double(), store))
    model.set_attn_implementation("eager")
    fresh(prefix_cache(model, store))
    fresh(prefix_cache(tiny(rms_norm_eps=1e-3), store))
    assert len(seen) == 9


def test_a_tenant_cannot_grow_beyond_its_quota(store):
    model = tiny()
    cache = prefix_cache(model, store, tenant="alice")
    block = cache.namespace().block_bytes
    cache = prefix_cache(model, store, tenant="alice", quota=-(-block // 4096) * 4096 * 8)
    other = prefix_cache(model, store, tenant="bob")
    ids = prompts(4)
    wanted = [plain(model, one) for one in ids]
    for one, tokens in zip(ids * 2, wanted * 2):
        for cached in (cache, other):
            assert torch.equal(cached.generate(one, max_new_tokens=NEW, do_sample=False), tokens)
    keys = {key for tokens in wanted for key in nvtier.kv.chain(cache.namespace().fingerprint, tokens[0].tolist(), cache.block_tokens)}
    used = [sum(cached.namespace().contains(sorted(keys))) for cached in (cache, other)]
    assert 0 < used[0] <= 8 < used[1]


def test_tenants_never_see_each_others_blocks(store):
    model = tiny()
    ids = prompts(1)[0]
    caches = {name: prefix_cache(model, store, tenant=name) for name in ("alice", "bob", "")}
    for cache in caches.values():
        cache.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert cache.last["stored_tokens"] == 0
    for cache in caches.values():
        assert torch.equal(cache.generate(ids, max_new_tokens=NEW, do_sample=False), plain(model, ids))
        assert cache.last["stored_tokens"] == 96


@pytest.mark.parametrize("plan", ["load", "auto"])
def test_flipped_bytes_in_the_pool_are_a_miss_and_never_wrong_output(path, plan):
    model = tiny("gemma3")
    ids = prompts(1, length=400)[0]
    expected = plain(model, ids)
    with nvtier.kv.Store(path, budget=128 << 20, ram=16 << 20) as store:
        prefix_cache(model, store, plan=plan).generate(ids, max_new_tokens=NEW, do_sample=False)
    flipped = 0
    for name in path.rglob("*"):
        if name.is_file() and ".nvtier-kv" not in name.name and name.stat().st_size >= 1 << 20 and is_slab(name):
            with open(name, "r+b") as file:
                content = bytearray(file.read())
                # One bit in each third block's worth of bytes.
                for at in range(5000, len(content), 3 * 7 * 2 * 2 * 16 * 16 * 4):
                    content[at] ^= 4
                    flipped += 1
                file.seek(0)
                file.write(content)
    assert flipped
    with nvtier.kv.Store(path, budget=128 << 20, ram=16 << 20) as store:
        cache = prefix_cache(model, store, plan=plan)
        assert torch.equal(cache.generate(ids, max_new_tokens=NEW, do_sample=False), expected)
        assert cache.last["stored_tokens"] == 384
        if plan == "load":
            assert cache.last["loaded_tokens"] < 384 and cache.namespace().stat()["corrupt"] > 0
        assert torch.equal(cache.generate(ids, max_new_tokens=NEW, do_sample=False), expected)


def is_slab(name):
    """Whether blocks are in a file of a pool: floats, that is, not the catalog and not the log."""
    head = name.read_bytes()[: 1 << 16]
    floats = torch.frombuffer(bytearray(head), dtype=torch.float32)
    return bool(torch.isfinite(floats).all()) and bool((floats.abs() > 1e-3).float().mean() > 0.5)


CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
import test_transformers as t
import nvtier, torch
model = t.tiny()
with nvtier.kv.Store(sys.argv[1], budget=128 << 20, ram=16 << 20) as store:
    cache = t.prefix_cache(model, store)
    for index, ids in enumerate(t.prompts(1000)):
        cache.generate(ids, max_new_tokens=t.NEW, do_sample=False)
        if index == 4:
            cache.namespace().flush()
        print(index, flush=True)
"""


def test_a_kill_in_the_middle(path):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True
    )
    try:
        for index in range(8):
            assert child.stdout.readline() == f"{index}\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    model = tiny()
    with nvtier.kv.Store(path, budget=128 << 20, ram=16 << 20) as store:
        cache = prefix_cache(model, store)
        for index, ids in enumerate(prompts(8)):
            assert torch.equal(cache.generate(ids, max_new_tokens=NEW, do_sample=False), plain(model, ids))
            if index <= 4:
                assert cache.last["stored_tokens"] == 96


def test_what_blocks_cannot_stand_for_is_refused(store):
    model = tiny()
    cache = prefix_cache(model, store)
    ids = prompts(2)
    with pytest.raises(nvtier.NotSupported, match="one sequence"):
        cache.generate(torch.cat(ids), max_new_tokens=1)
    mask = torch.ones_like(ids[0])
    mask[0, 0] = 0
    with pytest.raises(nvtier.NotSupported, match="padding"):
        cache.generate(ids[0], attention_mask=mask)
    with pytest.raises(nvtier.NotSupported, match="pixel_values"):
        cache.generate(ids[0], pixel_values=torch.zeros(1))
    with pytest.raises(nvtier.NotSupported, match="past_key_values"):
        cache.generate(ids[0], past_key_values=None)
    with pytest.raises(nvtier.InvalidArgument, match="plan"):
        prefix_cache(model, store, plan="fast")
    model.train()
    with pytest.raises(nvtier.InvalidArgument, match="training"):
        prefix_cache(model, store)
    with pytest.raises(nvtier.NotSupported, match="dynamic"):
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        prefix_cache(tiny(rope_parameters=rope), store)


def test_a_deadline_that_is_over_costs_only_time(store):
    model = tiny()
    ids = prompts(1)[0]
    prefix_cache(model, store).generate(ids, max_new_tokens=NEW, do_sample=False)
    cache = prefix_cache(model, store, plan="load", deadline=0)
    space = cache.namespace()
    space.forget(cache._keys(space, ids[0].tolist()))
    assert torch.equal(cache.generate(ids, max_new_tokens=NEW, do_sample=False), plain(model, ids))
    assert cache.last["stored_tokens"] == 96 and cache.last["loaded_tokens"] == 0


@pytest.fixture(scope="module")
def real():
    folder = os.environ.get("NVTIER_MODEL")
    if not folder:
        pytest.skip("NVTIER_MODEL is not set: run this through `cargo xtask test`")
    snapshot = os.path.join(folder, "snapshot")
    model = hf.AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32).eval()
    return model, hf.AutoTokenizer.from_pretrained(snapshot)


QUESTIONS = [
    "Name three rivers.", "What is a hash?", "Why is the sky blue?", "Write a line about the sea.", "What is 12 times 12?",
    "Who wrote Faust?", "How do bees find flowers?", "Define entropy.", "Name a prime above 50.", "What is NVMe?",
    "Tell me a joke.", "What is a tensor?", "How far is the moon?", "What does a compiler do?", "Name two gases.",
    "What is bread made of?", "Describe a cat.", "What is the boiling point of water?", "Say hello in French.", "What is a queue?",
]  # fmt: skip
SYSTEM = "You are a careful assistant who answers in one short sentence, and says so when the answer is not known. " * 2


EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "chat_sessions.py"
#: MiB of all chats in the pool, of which the index has 8: less than they come to.
SMALL_BUDGET = 14


def test_the_example_of_several_chats_on_one_small_budget(real, tmp_path):
    """It runs as people run it, twice, in processes of its own; what it says is what the model says without a cache."""
    if not EXAMPLE.exists():
        pytest.skip(f"the examples are not beside the tests: {EXAMPLE}")
    model, tokenizer = real
    spec = importlib.util.spec_from_file_location("chat_sessions", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    expected = {}
    for user in ("user-0", "user-1", "user-2"):
        chat = [{"role": "system", "content": f"You talk to {user}. Answer in one sentence."}]
        for turn in range(2):
            chat.append({"role": "user", "content": example.QUESTIONS[turn]})
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
            answer = tokenizer.decode(plain(model, ids, 8)[0, ids.shape[1] :], skip_special_tokens=True)
            chat.append({"role": "assistant", "content": answer})
            expected[user, turn] = answer.strip()[:60]
    folder = os.path.join(os.environ["NVTIER_MODEL"], "snapshot")
    # By itself it computes what it can compute sooner than load, and these prompts are short.
    options = ["--plan", "load", "--turns", "2", "--tokens", "8", "--budget", str(SMALL_BUDGET), "--ram", "4", "--device", "cpu", "--dtype", "float32"]
    loaded, made_room = [], 0
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(EXAMPLE), folder, str(tmp_path / "pool"), *options],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said = {}
        lines = done.stdout.splitlines()
        for user, turn, prompt, came, computed, text in re.findall(
            r"^(user-\d) turn (\d): prompt (\d+) tokens, (\d+) loaded, (\d+) computed, \d+ saved, [\d.]+ s: (.*)$", done.stdout, re.MULTILINE
        ):
            said[user, int(turn)] = ast.literal_eval(text)
            loaded.append(int(came))
            assert int(came) + int(computed) <= int(prompt)
        assert said == expected
        blocks, used, budget, gone = map(int, re.fullmatch(r"store: (\d+) blocks, (\d+) MiB of (\d+) MiB, (\d+) made room", lines[-1]).groups())
        assert blocks > 0 and used <= budget == SMALL_BUDGET
        made_room += gone
    assert made_room > 0, "the chats are to be more than the budget"
    # A second turn goes on from the first one, and the second process from what the first one left.
    assert any(loaded[:6]) and any(loaded[6:])


def test_twenty_prompts_of_a_real_model_give_the_same_tokens(real, store):
    model, tokenizer = real
    cache = prefix_cache(model, store, tokenizer=tokenizer)
    inputs = [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )["input_ids"]
        for question in QUESTIONS
    ]  # fmt: skip
    expected = [plain(model, ids, 10) for ids in inputs]
    for index, (ids, tokens) in enumerate(zip(inputs, expected)):
        assert torch.equal(cache.generate(ids, max_new_tokens=10, do_sample=False), tokens), (index, cache.last)
        assert index == 0 or cache.last["stored_tokens"] >= 32
    # Without what was computed, from the drive alone.
    cold = prefix_cache(model, store, tokenizer=tokenizer, plan="load")
    space = cold.namespace()
    for ids, tokens in zip(inputs, expected):
        space.forget(cold._keys(space, tokens[0].tolist()))
        assert torch.equal(cold.generate(ids, max_new_tokens=10, do_sample=False), tokens)
        assert cold.last["loaded_tokens"] == cold.last["stored_tokens"] >= 32
    other = prefix_cache(model, store)
    other.generate(inputs[0], max_new_tokens=1)
    assert other.last["stored_tokens"] == 0, "without the tokenizer it is another fingerprint"


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-sliding", "gemma3"])
def test_tokens_behind_others_need_no_mask(family, monkeypatch):
    """The same logits, to the bit where PyTorch has one kernel for both, without the mask that keeps its fastest kernel away."""
    from nvtier import _attention

    model = tiny(family)
    ids = prompts(1)[0]
    made = []
    real = _attention.sdpa_mask
    monkeypatch.setattr(_attention, "sdpa_mask", lambda *args, **rest: made.append(rest.get("local_size")) or real(*args, **rest))

    def logits(context):
        cache = nvtier.transformers.KvCache(model.config)
        found = []
        with torch.no_grad(), context:
            for piece in (ids[:, :50], ids[:, 50:80], ids[:, 80:81], ids[:, 81:]):
                found.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
        return torch.cat(found, dim=1)

    expected = logits(contextlib.nullcontext())
    assert not made
    assert torch.equal(logits(_attention.without_masks(model)), expected)
    # One mask a forward pass is asked for each kind of layer; those of full layers behind others are not made.
    full = [size for size in made if size is None]
    assert len(full) == (0 if family == "mistral-sliding" else 2), made
    assert (family in ("llama", "qwen3")) == (len(made) == len(full))
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyboardInterrupt):
        with _attention.without_masks(model):
            assert model.config._attn_implementation != "sdpa"
            raise KeyboardInterrupt
    assert model.config._attn_implementation == "sdpa"
    eager = tiny(family, attn_implementation="eager")
    with _attention.without_masks(eager):
        assert eager.config._attn_implementation == "eager"


def test_padding_is_masked_without_masks():
    """A mask of padding is not lost."""
    from nvtier import _attention

    model = tiny()
    ids = prompts(1)[0]
    mask = torch.ones_like(ids)
    mask[:, :7] = 0

    def logits(context):
        cache = nvtier.transformers.KvCache(model.config)
        with torch.no_grad(), context:
            model(input_ids=ids[:, :60], attention_mask=mask[:, :60], past_key_values=cache, use_cache=True)
            return model(input_ids=ids[:, 60:], attention_mask=mask, past_key_values=cache, use_cache=True).logits

    expected = logits(contextlib.nullcontext())
    assert torch.equal(logits(_attention.without_masks(model)), expected)
    mask.fill_(1)
    assert not torch.equal(logits(contextlib.nullcontext()), expected), "the mask made no difference"

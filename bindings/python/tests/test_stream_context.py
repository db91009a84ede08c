"""nvtier.stream.Cache: contexts outside the device's memory give the logits of transformers' DynamicCache, bit for bit; budgets; whose state is taken away."""

import copy
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import nvtier

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
hf.utils.logging.set_verbosity_error()

import nvtier.stream  # noqa: E402
import test_stream as whole  # noqa: E402
from common import LIMIT_S  # noqa: E402
from test_stream import SMALL  # noqa: E402
from transformers import DynamicCache  # noqa: E402

pool = whole.pool

FAMILIES = {
    "llama": (hf.LlamaConfig, {}),
    # Every other layer has a window, and no two heads share keys.
    "gemma2": (hf.Gemma2Config, {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16, "num_key_value_heads": 4}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 32}),
    # All layers have one, shorter than a segment at times.
    "mistral": (hf.MistralConfig, {"sliding_window": 17}),
}
#: Bytes of a token in a layer, with two heads of 16 in bfloat16.
ROW = 2 * 2 * 16 * 2


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(family="llama", attention="sdpa", dtype=torch.bfloat16, **more):
    kind, own = FAMILIES[family]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(kind(**{**SMALL, **own, **more}), dtype=dtype, attn_implementation=attention)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.12) if parameter.dim() > 1 else None
    model.generation_config.eos_token_id = None
    return model.eval()


def prompt(batch=1, tokens=90):
    return torch.randint(1, SMALL["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.no_grad()
def says(model, cache, ids, chunk=None, steps=20):
    """Logits of a prompt, given in pieces, and of what is said then."""
    seen = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(chunk or ids.shape[1], dim=1)]
    for _ in range(steps):
        seen.append(model(input_ids=seen[-1][:, -1:].argmax(-1), past_key_values=cache).logits)
    return torch.cat(seen, dim=1)


def states(pool):
    return [entry.path for entry in pool.ls(".nvtier-kv") if "context-" in entry.path] if pool.exists(".nvtier-kv") else []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch, chunk, ram", [(1, None, 0), (2, 13, "100KiB"), (2, None, "10MiB"), (1, 40, 0)])
def test_the_logits_are_those_of_a_dynamic_cache(pool, family, batch, chunk, ram):
    model, ids = tiny(family), prompt(batch)
    row = 2 * batch * model.config.num_key_value_heads * model.config.head_dim * 2
    wanted = says(model, DynamicCache(config=model.config), ids, chunk)
    # Two layers of 110 tokens, and tails.
    vram = row * (2 * 112 + 6 * 4 + 16)
    with nvtier.stream.Cache(model, pool=pool, vram=vram, ram=ram, room="16MiB", chunk_tokens=4) as cache:
        assert torch.equal(says(model, cache, ids, chunk), wanted)
        stats = cache.stats()
        assert stats["tokens"] == 110 and stats["device_peak_bytes"] <= vram, stats
        held = stats["held"]
        if family == "mistral":
            # What has left the window is kept nowhere.
            assert sum(held.values()) <= 6 * row * (17 + 16 + 4), stats
        elif family != "gemma2":
            # What is full of tokens was stored once; nothing else was.
            assert stats["stored_bytes"] == held["ram"] + held["pool"] > 3 * 100 * row, stats
            assert sum(held.values()) == 6 * row * 108 + 6 * row * 4, stats
            assert stats["fetched_bytes"] > 10 * stats["stored_bytes"] > 0
            assert (held["ram"] > 0) == (ram != 0) and (held["pool"] > 0) == (ram != "10MiB"), stats
            assert (stats["drive_written_bytes"] > 0) == (ram != "10MiB") and (stats["ram_bytes"] > 0) == (ram != 0), stats
            assert states(pool)
    assert not states(pool)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_takes_it(pool, family, attention):
    """With padding, prefill in pieces, sampling, beams, and tokens that are guessed and taken back."""
    model = tiny(family, attention)
    ids = prompt(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    ids[0, :7] = 0
    # Repeats, so that looking up guesses something.
    again = prompt(1, 8).repeat(1, 6)
    calls = [
        dict(input_ids=ids, attention_mask=mask),
        dict(input_ids=ids, attention_mask=mask, prefill_chunk_size=16),
        dict(input_ids=ids, attention_mask=mask, num_beams=3, num_return_sequences=2),
        dict(input_ids=ids, attention_mask=mask, do_sample=True, top_k=20),
        dict(input_ids=again, attention_mask=torch.ones_like(again), prompt_lookup_num_tokens=4),
    ]
    for call in calls:
        sequences = max(call["input_ids"].shape[0] * call.get("num_beams", 1), 1)
        # Two layers of 74 tokens, and tails.
        vram = 2 * model.config.num_key_value_heads * 16 * 2 * sequences * (2 * 76 + 6 * 4 + 16)
        said = []
        for make in (
            lambda: DynamicCache(config=model.config),
            lambda: nvtier.stream.Cache(model, pool=pool, vram=vram, ram="40KiB", room="16MiB", chunk_tokens=4),
        ):
            torch.manual_seed(3)
            cache = make()
            said.append(
                model.generate(
                    **{"do_sample": False, **call}, past_key_values=cache, max_new_tokens=24, return_dict_in_generate=True, output_logits=True
                )
            )
        assert torch.equal(said[0].sequences, said[1].sequences), call
        assert all(torch.equal(one, other) for one, other in zip(said[0].logits, said[1].logits)), call
        assert cache.stats()["fetched_bytes"] > 0 and cache.stats()["device_peak_bytes"] <= vram, call
        cache.close()
    assert not states(pool)


def test_it_is_the_streamed_models_own(pool):
    """Weights and context of one model, both larger than what the device has for them."""
    model, ids = tiny(), prompt()
    wanted = says(model, DynamicCache(config=model.config), ids)
    layer = whole.bytes_of(model.model.layers[0])
    rest = whole.bytes_of(model) - 6 * layer
    model = nvtier.stream.offload(model, pool=pool, name="m", vram=rest + 2 * layer)
    cache = nvtier.stream.Cache(model, vram=ROW * 300, ram="20KiB", room="16MiB", chunk_tokens=4)
    assert torch.equal(says(model, cache, ids), wanted)
    assert cache.stats()["held"]["pool"] > 0 and states(pool)
    nvtier.stream.close(model)
    assert not states(pool)
    with pytest.raises(nvtier.Closed, match="was closed"):
        cache.crop(-1)


def test_what_fits_stays_on_the_device(pool):
    model, ids = tiny(), prompt()
    wanted = says(model, DynamicCache(config=model.config), ids)
    for vram in (None, "1MiB"):
        with nvtier.stream.Cache(model, pool=pool, vram=vram, room="16MiB") as cache:
            assert torch.equal(says(model, cache, ids), wanted)
            stats = cache.stats()
            assert stats["stored_bytes"] == stats["fetched_bytes"] == 0 and not states(pool), stats
    # Where a part of it fits, that part does: each step fetches the rest.
    vram = ROW * (2 * 112 + 3 * 112 + 6 * 4 + 8)
    with nvtier.stream.Cache(model, pool=pool, vram=vram, room="16MiB", chunk_tokens=4) as cache:
        assert torch.equal(says(model, cache, ids), wanted)
        held = cache.stats()["held"]
        assert 2 * 100 * ROW < held["pool"] < 4 * 112 * ROW and cache.stats()["device_peak_bytes"] <= vram, cache.stats()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tokens_are_taken_back_and_sequences_chosen(pool, family):
    """As a DynamicCache does it, whatever of it is where."""
    model = tiny(family)

    @torch.no_grad()
    def goes(cache):
        seen = []

        def goes_on(batch, tokens):
            seen.append(model(input_ids=prompt(batch, tokens), past_key_values=cache).logits)

        goes_on(2, 20)
        cache.activate_past_recording()
        goes_on(2, 31)
        # Many at once, within the tail, beyond a segment. A layer with a window has no more than what came since the last time.
        for count in (-13, -1, -4, -3, 0):
            cache.crop(count)
            goes_on(2, 5)
        cache.crop(-4)
        for layer in cache.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False
        goes_on(2, 8)
        cache.batch_repeat_interleave(2)
        goes_on(4, 3)
        cache.reorder_cache(torch.tensor([2, 0, 0, 1]))
        goes_on(4, 9)
        cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
        goes_on(4, 1)
        cache.batch_select_indices(torch.tensor([True, False, True, True]))
        goes_on(3, 6)
        cache.batch_select_indices(torch.tensor([2]))
        goes_on(1, 30)
        return seen

    wanted = goes(DynamicCache(config=model.config))
    with nvtier.stream.Cache(model, pool=pool, vram="120KiB", ram="24KiB", room="16MiB", chunk_tokens=4) as cache:
        for number, (one, other) in enumerate(zip(goes(cache), wanted)):
            assert torch.equal(one, other), number
        stats = cache.stats()
        assert stats["fetched_bytes"] > 0 and stats["device_peak_bytes"] <= 120 << 10, stats
        # Once more from the beginning, in the same cache.
        cache.reset()
        assert cache.get_seq_length() == 0 and sum(cache.stats()["held"].values()) == cache._tier.tails and not states(pool)
        ids = prompt(1, 60)
        assert torch.equal(says(model, cache, ids), says(model, DynamicCache(config=model.config), ids))
        assert cache.stats()["stored_bytes"] >= stats["stored_bytes"]


def test_a_real_model(pool):
    folder = os.environ.get("NVTIER_MODEL")
    if not folder:
        pytest.skip("NVTIER_MODEL is not set: run this through `cargo xtask test`")
    source = Path(folder) / "snapshot"
    model = hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, local_files_only=True).eval()
    text = " ".join(f"The {number}th of them is {number * number}." for number in range(40))
    ids = hf.AutoTokenizer.from_pretrained(source, local_files_only=True)(text, return_tensors="pt").input_ids[:, :400]
    wanted = says(model, DynamicCache(config=model.config), ids, 150, 6)
    config = model.config
    row = 2 * config.num_key_value_heads * config.head_dim * 2
    # Of 30 layers, two.
    vram = row * (2 * 410 + 30 * 16 + 64)
    with nvtier.stream.Cache(model, pool=pool, vram=vram, ram="4MiB", room="64MiB", chunk_tokens=16) as cache:
        assert torch.equal(says(model, cache, ids, 150, 6), wanted)
        stats = cache.stats()
        assert stats["device_peak_bytes"] <= vram < 30 * 400 * row / 8 and stats["held"]["pool"] > stats["held"]["ram"] > 0, stats


def test_a_budget_below_one_layer_is_refused_with_what_is_needed(pool):
    model, ids = tiny(), prompt()
    wanted = says(model, DynamicCache(config=model.config), ids, steps=0)
    for chosen in (4, None):
        cache = nvtier.stream.Cache(model, pool=pool, vram=ROW * 60, room="16MiB", chunk_tokens=chosen)
        with pytest.raises(nvtier.OutOfDeviceMemory, match=r"90 tokens of one layer take 11520; .* \d+ are enough, and \d+ to fetch") as error:
            says(model, cache, ids)
        assert not states(pool)
        with pytest.raises(nvtier.Closed, match="another one"):
            says(model, cache, ids)
        enough = int(str(error.value).split(" are enough")[0].rsplit(" ", 1)[-1])
        assert enough < 2 * 90 * ROW
        for chunk in (None, 7):
            with nvtier.stream.Cache(model, pool=pool, vram=enough, room="16MiB", chunk_tokens=chosen) as cache:
                logits = says(model, cache, ids, chunk, steps=0)
                assert torch.equal(logits, wanted) or chunk is not None
                assert cache.stats()["device_peak_bytes"] <= enough and cache.stats()["held"]["pool"] > 0
                # And when it has become too long.
                with pytest.raises(nvtier.OutOfDeviceMemory, match="are enough"):
                    says(model, cache, prompt(1, 60), steps=0)
        assert not states(pool)


def test_a_full_pool_is_an_error_that_leaves_nothing(pool, tmp_path):
    model, ids = tiny(), prompt()
    vram = ROW * 300
    with nvtier.stream.Cache(model, pool=pool, vram=vram, room="60KiB", chunk_tokens=4) as cache:
        with pytest.raises(nvtier.NoSpace, match="room for take more than the 61440 bytes of the pool"):
            says(model, cache, ids)
        assert not states(pool)
        with pytest.raises(nvtier.Closed):
            says(model, cache, ids)
    with pytest.raises(nvtier.NoSpace, match="room="):
        nvtier.stream.Cache(model, pool=pool, vram=vram, room="900TiB")
    # One that others have filled by then.
    nvtier.format(tmp_path / "small", size=400 << 20, members=[tmp_path / "image"])
    with nvtier.Pool(tmp_path / "small") as small:
        cache = nvtier.stream.Cache(model, pool=small, vram=vram, room="64MiB", chunk_tokens=4)
        small.write("other", bytes(int(small.stat()["free_bytes"]) - (20 << 20)))
        with pytest.raises(nvtier.NoSpace):
            says(model, cache, ids)
        assert not states(small)


def test_dropping_it_takes_its_state_away(pool):
    model = tiny()
    cache = nvtier.stream.Cache(model, pool=pool, vram=ROW * 300, room="16MiB", chunk_tokens=4)
    other = nvtier.stream.Cache(model, pool=pool, vram=ROW * 300, room="16MiB", chunk_tokens=4)
    says(model, cache, prompt())
    says(model, other, prompt())
    assert len(states(pool)) == 2
    # Another one does not take them for left behind.
    nvtier.stream.Cache(model, pool=pool, vram=ROW * 300, room="16MiB").close()
    assert len(states(pool)) == 2
    del cache
    gc.collect()
    assert len(states(pool)) == 1
    other.close()
    other.close()
    assert not states(pool)


CHILD = """\
import sys
import torch, nvtier, nvtier.stream
import test_stream_context as context
pool = nvtier.Pool(sys.argv[1])
model = context.tiny()
cache = nvtier.stream.Cache(model, pool=pool, vram=context.ROW * 300, room="16MiB", chunk_tokens=4)
context.says(model, cache, context.prompt())
print(context.states(pool)[0], flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_with_the_next_cache(tmp_path):
    nvtier.format(tmp_path / "pool")
    tests = os.path.dirname(os.path.abspath(__file__))
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "pool")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])},
    )  # fmt: skip
    try:
        name = child.stdout.readline().strip()
        assert name, child.poll()
        model = tiny()
        with nvtier.Pool(tmp_path / "pool") as pool:
            with nvtier.stream.Cache(model, pool=pool, vram=ROW * 300, room="16MiB", chunk_tokens=4) as cache:
                says(model, cache, prompt())
                assert name in states(pool) and len(states(pool)) == 2, "the other one lives"
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=LIMIT_S)
        with nvtier.Pool(tmp_path / "pool") as pool:
            assert states(pool) == [name]
            nvtier.stream.Cache(model, pool=pool, vram=ROW * 300, room="16MiB").close()
            assert not states(pool)
    finally:
        child.kill()
        child.communicate()


def test_modes_may_change(pool):
    model, ids = tiny(), prompt()
    wanted = says(model, DynamicCache(config=model.config), ids)
    with nvtier.stream.Cache(model, pool=pool, vram=ROW * 300, room="16MiB", chunk_tokens=4) as cache:
        with torch.inference_mode():
            first = model(input_ids=ids[:, :61], past_key_values=cache).logits.clone()
        assert torch.equal(torch.cat([first, says(model, cache, ids[:, 61:])], dim=1)[:, 61:].argmax(-1), wanted[:, 61:].argmax(-1))


def test_what_makes_no_sense_is_refused(pool):
    model = tiny()

    def refused(kind, words, model=model, **options):
        with pytest.raises(kind, match=words):
            nvtier.stream.Cache(model, **{"pool": pool, "vram": "1MiB", "room": "16MiB", **options})

    refused(nvtier.InvalidArgument, "pool=", pool=None)
    refused(nvtier.InvalidArgument, "20 apples", vram="20 apples")
    refused(nvtier.InvalidArgument, "chunk_tokens=0", chunk_tokens=0)
    refused(nvtier.NotSupported, "models of transformers", model=torch.nn.Linear(2, 2))
    shared = copy.deepcopy(model)
    shared.config.num_kv_shared_layers = 2
    refused(nvtier.NotSupported, "share", model=shared)
    mixed = copy.deepcopy(model)
    mixed.config.layer_types = ["full_attention", "linear_attention"] * 3
    refused(nvtier.NotSupported, "LinearAttentionLayer", model=mixed)
    with nvtier.stream.Cache(model, pool=pool, vram="1MiB", room="16MiB") as cache:
        ids = prompt(2, 8)
        with pytest.raises(nvtier.InvalidArgument, match="no_grad"):
            model(input_ids=ids, past_key_values=cache)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
            # Such mistakes are found before anything changes.
            with pytest.raises(nvtier.InvalidArgument, match="sequences"):
                model(input_ids=ids[:1], past_key_values=cache, attention_mask=torch.ones(1, 16))
            model(input_ids=ids, past_key_values=cache)
        for way in (list, copy.deepcopy):
            with pytest.raises(nvtier.NotSupported):
                way(cache)

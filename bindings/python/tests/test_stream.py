"""nvtier.stream: models generate what they generate in memory, with one block of many on the device; whose weights are taken."""

import os

import pytest

import nvtier

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
hf.utils.logging.set_verbosity_error()

import nvtier.stream  # noqa: E402

SMALL = dict(
    vocab_size=311,
    hidden_size=64,
    intermediate_size=168,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
FAMILIES = {
    "llama": (hf.LlamaConfig, {"tie_word_embeddings": False}),
    "gemma2": (hf.Gemma2Config, {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}),
    "qwen2-moe": (
        hf.Qwen2MoeConfig,
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
    ),
}


@pytest.fixture
def pool(tmp_path):
    nvtier.format(tmp_path / "pool")
    with nvtier.Pool(tmp_path / "pool") as pool:
        yield pool


def tiny(family="llama", seed=0, dtype=torch.bfloat16):
    kind, own = FAMILIES[family]
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(kind(**{**SMALL, **own}), dtype=dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.12) if parameter.dim() > 1 else None
    model.generation_config.eos_token_id = None
    return model.eval()


def says(model):
    ids = torch.arange(40).view(2, 20) + 3
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return logits, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)


def same(model, wanted):
    return all(torch.equal(one, other) for one, other in zip(says(model), wanted))


def bytes_of(model):
    return sum(param.numel() * param.element_size() for param in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ram", [0, "200KiB"])
def test_models_say_the_same(pool, family, ram):
    model = tiny(family)
    wanted, all_of_it = says(model), bytes_of(model)
    layer = bytes_of(model.model.layers[0])
    rest = all_of_it - sum(bytes_of(block) for block in model.model.layers)
    vram = rest + 2 * layer
    model = nvtier.stream.offload(model, pool=pool, name="m", vram=vram, ram=ram)
    assert same(model, wanted)
    stats = nvtier.stream.stats(model)
    assert stats["device_peak_bytes"] <= vram < all_of_it, stats
    assert (stats["ram_bytes"] > 0) == (ram != 0)
    assert stats["drive_read_bytes"] > 5 * layer


def test_a_part_may_stay_on_the_device(pool):
    model = tiny()
    wanted, all_of_it = says(model), bytes_of(model)
    model = nvtier.stream.offload(model, pool=pool, name="m")
    assert same(model, wanted)
    first = nvtier.stream.stats(model)["fetched_bytes"]
    assert same(model, wanted)
    assert nvtier.stream.stats(model)["fetched_bytes"] == first <= all_of_it * 1.1, "all of it stays where nothing limits it"
    layer = bytes_of(tiny().model.layers[0])
    half = nvtier.stream.offload(tiny(), pool=pool, name="m2", vram=all_of_it - 2 * layer)
    assert same(half, wanted)
    before = nvtier.stream.stats(half)["fetched_bytes"]
    # What is fetched counts when it is there: the first of a pass may count for the one before, so that one pass alone says little.
    passes = 4
    with torch.no_grad():
        for _ in range(passes):
            half(input_ids=torch.arange(8).view(1, 8))
    fetched = nvtier.stream.stats(half)["fetched_bytes"] - before
    assert 0 < fetched < passes * 5 * layer
    assert nvtier.stream.stats(half)["device_peak_bytes"] <= all_of_it - 2 * layer


def test_weights_in_the_pool_are_these_weights_or_are_written_anew(pool):
    model = tiny()
    wanted = says(model)
    assert same(nvtier.stream.offload(model, pool=pool, name="m"), wanted)
    # The same weights again: nothing is written.
    nvtier.stream.close(model)
    again = nvtier.stream.offload(tiny(), pool=pool, name="m")
    assert nvtier.stream.stats(again)["stored_bytes"] == 0 and same(again, wanted)
    nvtier.stream.close(again)
    # Another model under that name is another one.
    other = tiny(seed=1)
    wanted_other = says(other)
    other = nvtier.stream.offload(other, pool=pool, name="m")
    assert nvtier.stream.stats(other)["stored_bytes"] > 0 and same(other, wanted_other) and not same(other, wanted)


def test_a_model_without_weights_takes_those_of_the_pool(pool):
    accelerate = pytest.importorskip("accelerate")
    wanted = says(tiny())
    first = nvtier.stream.offload(tiny(), pool=pool, name="m")
    nvtier.stream.close(first)
    with accelerate.init_empty_weights():
        empty = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**{**SMALL, **FAMILIES["llama"][1]}), dtype=torch.bfloat16)
    assert all(param.is_meta for param in empty.parameters())
    empty.generation_config.eos_token_id = None
    model = nvtier.stream.load(empty, pool=pool, name="m", vram="300KiB", ram="100KiB", device="cpu")
    assert same(model, wanted)
    nvtier.stream.close(model)
    # One whose buffers are not there either.
    with torch.device("meta"):
        empty = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**{**SMALL, **FAMILIES["llama"][1]}), dtype=torch.bfloat16)
    assert all(buffer.is_meta for buffer in empty.buffers())
    empty.generation_config.eos_token_id = None
    assert same(nvtier.stream.load(empty, pool=pool, name="m", vram="300KiB", device="cpu"), wanted)
    assert nvtier.stream.remove(pool, "other") is False


def test_what_makes_no_sense_is_refused(pool):
    with pytest.raises(nvtier.OutOfDeviceMemory, match="at least"):
        nvtier.stream.offload(tiny(), pool=pool, name="m", vram=1000)
    with pytest.raises(nvtier.NotFound, match="'m'"):
        nvtier.stream.load(tiny(), pool=pool, name="m")
    with pytest.raises(nvtier.InvalidArgument, match="name="):
        nvtier.stream.offload(tiny(), pool=pool, name="../m")
    with torch.device("meta"):
        meta = tiny()
    with pytest.raises(nvtier.InvalidArgument, match="load"):
        nvtier.stream.offload(meta, pool=pool, name="m")
    with torch.device("meta"):
        other = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3))
    with pytest.raises(nvtier.InvalidArgument, match="buffer"):
        nvtier.stream.load(other, pool=pool, name="m")
    model = nvtier.stream.offload(tiny(), pool=pool, name="m")
    with pytest.raises(nvtier.InvalidArgument, match="already"):
        nvtier.stream.offload(model, pool=pool, name="n")
    with pytest.raises(nvtier.NotSupported, match="state_dict"):
        model.state_dict()
    with pytest.raises(nvtier.InvalidArgument, match="not offloaded"):
        nvtier.stream.stats(tiny())
    nvtier.stream.close(model)
    nvtier.stream.close(model)
    with pytest.raises(nvtier.Closed):
        says(model)
    with pytest.raises(nvtier.InvalidArgument, match="another model"):
        nvtier.stream.load(tiny("gemma2"), pool=pool, name="m")


def test_damage_is_an_error_and_never_other_words(pool, tmp_path):
    model = tiny()
    wanted = says(model)
    model = nvtier.stream.offload(model, pool=pool, name="m", vram=bytes_of(tiny()) - 3 * bytes_of(tiny().model.layers[0]))
    assert same(model, wanted)
    files = [os.path.join(folder, name) for folder, _, names in os.walk(tmp_path / "pool") for name in names]
    largest = max(files, key=os.path.getsize)
    with open(largest, "r+b") as file:
        size = os.path.getsize(largest)
        for at in range(0, min(size, 32 << 20), 4096):
            file.seek(at + 100)
            byte = file.read(1)
            file.seek(at + 100)
            file.write(bytes([byte[0] ^ 0x10]))
    with pytest.raises(nvtier.Error):
        says(model)


def test_a_weight_that_is_used_behind_its_modules_back_is_no_number(pool):
    """Rather than zeros: the answer is visibly wrong."""

    class Peeks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x @ self.blocks[0].weight

    model = Peeks()
    x = torch.ones(2, 8)
    assert not model(x).isnan().any()
    model = nvtier.stream.offload(model, pool=pool, name="m", vram=1100)
    assert model(x).isnan().all()


EXPERTS = {
    "qwen3-moe": (hf.Qwen3MoeConfig, {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}),
    "gpt-oss": (
        hf.GptOssConfig,
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48, "head_dim": 16, "sliding_window": 24, "num_hidden_layers": 4},
    ),
    "mixtral": (hf.MixtralConfig, {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 48}),
}


def mixture(family, seed=0):
    kind, own = EXPERTS[family]
    torch.manual_seed(seed)
    # The loop over experts: the grouped kernels differ from it in the last bits.
    model = hf.AutoModelForCausalLM.from_config(kind(**{**SMALL, **own}), dtype=torch.float32, experts_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.12) if parameter.dim() > 1 else None
    model.generation_config.eos_token_id = None
    return model.eval()


def layers_of(model):
    return [module for module in model.modules() if isinstance(getattr(module, "num_experts", None), int) and any(True for _ in module.parameters(recurse=False))]


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("slots", [2, 9, None])
def test_experts_come_when_they_are_needed(pool, family, slots):
    model = mixture(family)
    wanted = says(model)
    layers = [module for module in layers_of(model) if "Experts" in type(module).__name__]
    count = layers[0].num_experts
    expert = sum(-(-param[0].numel() * param.element_size() // 256) * 256 for param in layers[0].parameters())
    dense = bytes_of(model) - sum(param.numel() * param.element_size() for layer in layers for param in layer.parameters())
    # All that is dense stays, and so many experts of all.
    vram = None if slots is None else 2 * dense + slots * expert
    model = nvtier.stream.offload(model, pool=pool, name="m", vram=vram, ram=3 * expert)
    assert same(model, wanted)
    stats = nvtier.stream.stats(model)
    found = stats["experts"]
    assert found["experts"] == count * len(layers) and found["expert_bytes"] == expert
    assert found["misses"] * expert <= stats["fetched_bytes"] <= found["misses"] * expert + 2 * dense
    if slots is None:
        # Each comes once.
        assert found["misses"] <= found["experts"] == found["slots"] and found["hits"] > 5 * found["misses"]
    else:
        assert found["slots"] < found["experts"] and stats["device_peak_bytes"] <= vram
        assert slots == 2 or found["hits"] > 0
    nvtier.stream.close(model)
    with pytest.raises(nvtier.Closed):
        says(model)

    # Once more, by a model that has no weights.
    again = mixture(family, seed=7)
    again = nvtier.stream.load(again, pool=pool, name="m", vram=vram)
    assert same(again, wanted)
    nvtier.stream.close(again)


def test_a_mixture_on_too_small_a_device_is_refused(pool):
    with pytest.raises(nvtier.OutOfDeviceMemory, match="two experts"):
        nvtier.stream.offload(mixture("qwen3-moe"), pool=pool, name="m", vram=40_000)

"""nvtier.train of models that were never in memory: weights go from their files into the pool; the numbers are those of a loaded model."""

import json
import os
import shutil
from pathlib import Path

import pytest

import nvtier

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

import nvtier.train  # noqa: E402
import test_train as single  # noqa: E402
from common import python  # noqa: E402
from test_train import ADAMW, compare, llama, train  # noqa: E402

one_thread, pool = single.one_thread, single.pool


def on_meta(folder, dtype=torch.float32, by_accelerate=False):
    config = hf.AutoConfig.from_pretrained(folder)
    config.use_cache = False
    before = torch.get_rng_state()
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert torch.equal(torch.get_rng_state(), before)
    if by_accelerate:
        # Its buffers are real, and nothing in it is tied.
        with accelerate.init_empty_weights():
            model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype)
        torch.set_rng_state(before)
    return model.train()


def loaded(folder, dtype=torch.float32):
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.config.use_cache = False
    return model.train()


@pytest.mark.parametrize(
    "precision, saved, tie, shard", [("fp32", "fp32", True, "50GB"), ("mixed", "bf16", False, "100KB"), ("bf16", "bf16", True, "100KB"), ("mixed", "fp32", True, "50GB")]
)
def test_the_numbers_are_those_of_a_loaded_model(pool, tmp_path, precision, saved, tie, shard):
    folder = tmp_path / "model"
    llama(tie=tie, precision=saved).save_pretrained(folder, max_shard_size=shard)
    assert len(list(folder.glob("*.safetensors"))) > 1 or shard == "50GB"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    reference = loaded(folder, dtype)
    model = on_meta(folder, dtype, by_accelerate=saved == "fp32")
    for one in (reference, model):
        one.gradient_checkpointing_enable({"use_reentrant": False})
    plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
    torch.manual_seed(5)
    wanted = train(reference, plain, 6, micro=2, clip=1.0, precision=precision)
    needs = nvtier.train.plan(reference, precision=precision)
    state = torch.get_rng_state()
    model, optimizer = nvtier.train.offload(
        model, torch.optim.AdamW, pool=pool, precision=precision, vram=needs["least_vram"], ram="200KiB", weights=folder, device="cpu", **ADAMW
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    torch.manual_seed(5)
    assert train(model, optimizer, 6, micro=2, clip=1.0, precision=precision) == wanted
    compare(reference, plain, optimizer)
    optimizer.save_pretrained(tmp_path / "tuned")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=dtype)
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), reference.parameters()))
    optimizer.commit({"next": 6}, wait=True)
    optimizer.close()

    # It goes on without the files.
    shutil.move(folder, tmp_path / "away")
    torch.manual_seed(6)
    wanted = train(reference, plain, 8, first=6, precision=precision)
    model = on_meta(tmp_path / "away", dtype)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model, optimizer = nvtier.train.offload(model, torch.optim.AdamW, pool=pool, precision=precision, resume=True, device="cpu", **ADAMW)
    torch.manual_seed(6)
    assert train(model, optimizer, 8, first=6, precision=precision) == wanted
    compare(reference, plain, optimizer)
    optimizer.close()


def test_groups_and_frozen_parameters_are_the_ones_that_were_named(pool, tmp_path):
    llama(tie=False).save_pretrained(tmp_path / "model")

    def groups(model):
        named = list(model.named_parameters())
        for name, parameter in named:
            parameter.requires_grad_("layers.1." not in name)
        norms = [parameter for name, parameter in named if "norm" in name and parameter.requires_grad]
        return [{"params": norms, "weight_decay": 0.0}, {"params": (p for n, p in named if "norm" not in n and p.requires_grad), "lr": 1e-3}]

    reference, model = loaded(tmp_path / "model"), on_meta(tmp_path / "model")
    plain = torch.optim.AdamW(groups(reference), fused=True, **ADAMW)
    torch.manual_seed(6)
    wanted = train(reference, plain, 4, clip=1.0)
    model, optimizer = nvtier.train.offload(
        model, torch.optim.AdamW, pool=pool, param_groups=groups(model), weights=tmp_path / "model", device="cpu", **ADAMW
    )
    torch.manual_seed(6)
    assert train(model, optimizer, 4, clip=1.0) == wanted
    compare(reference, plain, optimizer)
    optimizer.close()


def test_other_buffers_are_made_again(pool, tmp_path):
    """Gemma's scale of embeddings, and positions that are scaled; in the type that the model has."""
    common = dict(
        vocab_size=211, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64
    )
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    kinds = {"gemma3": hf.Gemma3TextConfig(**common, sliding_window=24), "llama3": hf.LlamaConfig(**common, rope_parameters=rope)}
    for kind, config in kinds.items():
        torch.manual_seed(2)
        hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / kind)
        reference, model = loaded(tmp_path / kind, torch.bfloat16), on_meta(tmp_path / kind, torch.bfloat16)
        model, optimizer = nvtier.train.offload(
            model, torch.optim.AdamW, pool=pool, run=kind, precision="bf16", weights=tmp_path / kind, device="cpu", **ADAMW
        )
        buffers = dict(model.named_buffers())
        for name, buffer in reference.named_buffers():
            assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), (kind, name)
        ids = torch.arange(1, 41).view(1, 40)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits), kind
        optimizer.close()


def test_a_real_model(pool, tmp_path):
    folder = os.environ.get("NVTIER_MODEL")
    if not folder:
        pytest.skip("NVTIER_MODEL is not set: run this through `cargo xtask test`")
    source = Path(folder) / "snapshot"
    reference, model = loaded(source), on_meta(source)
    for one in (reference, model):
        one.gradient_checkpointing_enable({"use_reentrant": False})
    model, optimizer = nvtier.train.offload(model, torch.optim.AdamW, pool=pool, precision="mixed", weights=source, device="cpu", **ADAMW)
    taken = dict(optimizer.weights())
    assert all(torch.equal(taken.pop(name), parameter) for name, parameter in reference.named_parameters()) and not taken
    wanted = train(reference, torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW), 2, precision="mixed")
    assert train(model, optimizer, 2, precision="mixed") == wanted
    optimizer.close()


PEAK = """\
import json, sys
import torch, transformers, nvtier, nvtier.train
folder, way = sys.argv[1:]
torch.set_num_threads(1)
def memory(what):
    # Not getrusage(): its peak is that of the process that began this one, where that was larger.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(what))
before = memory("VmRSS:")
config = transformers.AutoConfig.from_pretrained(folder)
if way == "files":
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
else:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
size = sum(parameter.numel() * 4 for parameter in model.parameters())
nvtier.format(f"{folder}/pool")
model, optimizer = nvtier.train.offload(
    model, torch.optim.AdamW, pool=f"{folder}/pool", lr=1e-3, weights=folder if way == "files" else None, device="cpu", vram="150MiB"
)
print(json.dumps([size, memory("VmHWM:") - before]))
optimizer.close()
"""


def test_a_model_is_never_in_memory_as_a_whole(tmp_path):
    """The peak of a process that begins a training, above what it has when torch and transformers are imported."""
    config = hf.LlamaConfig(
        vocab_size=2048, hidden_size=768, intermediate_size=2048, num_hidden_layers=44, num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=False
    )
    grown = {}
    for way in ("files", "loaded"):
        folder = tmp_path / way
        hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        size, grown[way] = json.loads(python(PEAK, folder, way).splitlines()[-1])
        shutil.rmtree(folder)
    assert size > 1100 << 20
    # What it has whatever the size is: the "device", which is memory here (150 MiB), buffers of the threads that move state (96 MiB), those of loads (up to 144 MiB); and
    # a layer of 28 MB, in its type and in the files'.
    assert grown["files"] < size / 2, (grown, size)
    # The measurement sees a model that is in memory.
    assert grown["loaded"] > size, (grown, size)


def test_what_makes_no_sense_is_refused(pool, tmp_path):
    folder = tmp_path / "model"
    model = llama(tie=False)
    model.save_pretrained(folder)

    def refused(kind, words, folder=folder, model=None, **options):
        with pytest.raises(kind) as error:
            nvtier.train.offload(model or on_meta(tmp_path / "model"), torch.optim.AdamW, pool=pool, device="cpu", weights=folder, **ADAMW, **options)
        for word in words:
            assert word in str(error.value), error.value
        assert not pool.exists(".nvtier-kv") or not list(pool.ls(".nvtier-kv"))

    refused(nvtier.InvalidArgument, ["weights=", "already"], model=llama(layers=2))
    refused(nvtier.InvalidArgument, ["meta", "weights="], folder=None)
    refused(nvtier.NotFound, ["nowhere"], folder=tmp_path / "nowhere")
    from nvtier.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")

    def others(name, change):
        changed = dict(tensors)
        change(changed)
        (tmp_path / name).mkdir()
        save_file(changed, tmp_path / name / "model.safetensors")
        return tmp_path / name

    lacks = others("lacks", lambda changed: [changed.pop("model.layers.3.mlp.up_proj.weight"), changed.pop("model.norm.weight")])
    refused(nvtier.Malformed, ["lack 2 weights", "model.layers.3.mlp.up_proj.weight, model.norm.weight", "from_pretrained"], folder=lacks)
    shape = others("shape", lambda changed: changed.update({"model.norm.weight": torch.ones(65)}))
    refused(nvtier.Malformed, ["model.norm.weight", "[65]", "[64]"], folder=shape)
    # A tied weight that the files have twice is one, or the files are wrong.
    tied = llama(tie=True)
    tied.config.save_pretrained(tmp_path / "tied")
    twice = others("twice", lambda changed: changed.update({"lm_head.weight": changed["model.embed_tokens.weight"].clone()}))
    model, optimizer = nvtier.train.offload(on_meta(tmp_path / "tied"), torch.optim.AdamW, pool=pool, device="cpu", weights=twice, run="twice", **ADAMW)
    assert torch.equal(dict(optimizer.weights())["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    optimizer.close()
    nvtier.train.remove(pool, "twice")
    with pytest.raises(nvtier.Malformed, match="lm_head.weight.*differ"):
        nvtier.train.offload(on_meta(tmp_path / "tied"), torch.optim.AdamW, pool=pool, device="cpu", weights=folder, run="differ", **ADAMW)

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
            self.register_buffer("scale", torch.ones(1))

    with torch.device("meta"):
        other = Other()
    refused(nvtier.InvalidArgument, ["buffer scale", "init_empty_weights"], model=other)

"""nvtier.stream on a GPU: passes of a model with a budget of VRAM, beside accelerate's disk_offload and the drive.

    stream_gpu_check.py --dir DIR --out FILE --nvtier NVTIER [--layers 28] [--rounds 3] [--context 131072 [--context-only] [--context-vram 2GiB] [--context-ram 16GiB]]

A Llama-3.2-3B shaped model of random bfloat16 weights. Needs torch, transformers, accelerate and a CUDA device, and root for dropping the page cache.

With --context N, nvtier.stream.Cache as well: a prompt of N tokens and some that are generated, with keys and values in memory (DynamicCache), in the pool, and in host
memory; whether all logits are the same, what the device had at most beside the weights, and tokens a second.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time

import torch
from accelerate import disk_offload
from train_gpu_check import bus, drive
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import nvtier
import nvtier.stream


def make(layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=24,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=1 << 20,
        dtype=torch.bfloat16,
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model.eval()


def drop_caches():
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3")
    except PermissionError:
        return False
    return True


def one_pass(model, ids):
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
    torch.cuda.synchronize()
    return time.perf_counter() - start, logits


#: Tokens of the prompt that are computed at once, and that are generated.
PIECE, STEPS = 2048, 16


@torch.no_grad()
def with_context(model, cache, ids):
    """Logits (of the prompt's last token and of each one generated) on the host, and how it went."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for part in ids.split(PIECE, dim=1):
        logits = model(input_ids=part, past_key_values=cache, logits_to_keep=1).logits
    seen = [logits.float().cpu()]
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(STEPS):
        seen.append(model(input_ids=seen[-1].argmax(-1).to(ids.device), past_key_values=cache).logits.float().cpu())
    decode = time.perf_counter() - start
    found = {
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": ids.shape[1] / prefill,
        "decode_tokens_per_second": STEPS / decode,
        "peak_gb": (torch.cuda.max_memory_allocated() - before) / 1e9,
    }
    return torch.cat(seen, dim=1), found


def contexts(pool, options):
    """The same context in memory and in both tiers."""
    model = make(options.layers)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, options.context), generator=generator).cuda()
    config = model.config
    layer = options.context * 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 2
    found = {"tokens": options.context, "layer_gb": layer / 1e9, "bytes": layer * options.layers}
    with_context(model, DynamicCache(config=config), ids[:, : 2 * PIECE])
    try:
        wanted, found["memory"] = with_context(model, DynamicCache(config=config), ids)
    except torch.cuda.OutOfMemoryError as error:
        # Then there is nothing to compare with, which is said; what the tiers do is measured all the same.
        wanted, found["memory"] = None, {"error": str(error).splitlines()[0]}
    # One layer is shown while the next one comes, and a sixteenth.
    vram = options.context_vram or 2 * (layer + (STEPS + PIECE) * layer // options.context) + layer // 8 + (64 << 20)
    for name, ram in (("pool", 0), ("ram", options.context_ram or layer * options.layers + (1 << 30))):
        with nvtier.stream.Cache(model, pool=pool, vram=vram, ram=ram) as cache:
            logits, entry = with_context(model, cache, ids)
            entry["stats"] = cache.stats()
        entry["equal"] = None if wanted is None else torch.equal(logits, wanted)
        print(json.dumps({name: entry}), flush=True)
        found[name] = entry
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--nvtier")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a context, to be kept in memory and outside of it")
    parser.add_argument("--context-vram", metavar="SIZE", help="of the device for that [what two layers need]")
    parser.add_argument("--context-ram", metavar="SIZE", help="of pinned host memory [what all of it needs]")
    parser.add_argument("--context-only", action="store_true", help="nothing else")
    options = parser.parse_args()
    if options.context_only and not options.context:
        parser.error("--context-only needs --context")
    if not torch.cuda.is_available():
        raise SystemExit("stream_gpu_check: torch sees no CUDA device here")
    folder = tempfile.mkdtemp(dir=options.dir)
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rounds": []}
    try:
        if options.context:
            nvtier.format(os.path.join(folder, "contexts"))
            with nvtier.Pool(os.path.join(folder, "contexts")) as pool:
                found["context"] = contexts(pool, options)
            shutil.rmtree(os.path.join(folder, "contexts"))
            torch.cuda.empty_cache()
        if options.context_only:
            return
        ids = torch.arange(64, device="cuda").view(1, 64)
        model = make(options.layers)
        found["bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
        one_pass(model, ids)
        found["in_memory_seconds"], wanted = one_pass(model, ids)
        nvtier.format(os.path.join(folder, "pool"))
        pool = nvtier.Pool(os.path.join(folder, "pool"))
        peer = make(options.layers).cpu()
        start = time.perf_counter()
        disk_offload(peer, os.path.join(folder, "peer"), execution_device=torch.device("cuda:0"))
        found["peer_offload_seconds"] = time.perf_counter() - start
        start = time.perf_counter()
        ours = nvtier.stream.offload(model, pool=pool, name="m", vram="2GiB")
        found["offload_seconds"] = time.perf_counter() - start
        del model
        torch.cuda.empty_cache()
        found["bus"] = bus()
        one_pass(ours, ids)
        found["caches_dropped"] = drop_caches()
        for round in range(options.rounds):
            entry = {"drive": drive(options.nvtier, folder)}
            for name in ("ours", "peer") if round % 2 == 0 else ("peer", "ours"):
                drop_caches()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = nvtier.stream.stats(ours)
                seconds, logits = one_pass(ours if name == "ours" else peer, ids)
                after = nvtier.stream.stats(ours)
                entry[name] = {"seconds": seconds, "equal": torch.equal(logits, wanted), "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
                if name == "ours":
                    entry[name]["read_bytes"] = after["drive_read_bytes"] - before["drive_read_bytes"]
                    entry[name]["state_peak_gb"] = after["device_peak_bytes"] / 1e9
            print(json.dumps(entry), flush=True)
            found["rounds"].append(entry)
        nvtier.stream.close(ours)
        del peer
        torch.cuda.empty_cache()
        ours = nvtier.stream.offload(make(options.layers), pool=pool, name="m", vram="2GiB", ram="16GiB")
        torch.cuda.empty_cache()
        one_pass(ours, ids)
        before = nvtier.stream.stats(ours)
        passes = [one_pass(ours, ids)[0] for _ in range(5)]
        after = nvtier.stream.stats(ours)
        found["ram"] = {
            "seconds": passes,
            "median": statistics.median(passes),
            "bytes": (after["ram_bytes"] - before["ram_bytes"]) / 5,
            "gb_per_second": (after["ram_bytes"] - before["ram_bytes"]) / sum(passes) / 1e9,
        }
        print(json.dumps(found["ram"]), flush=True)
        nvtier.stream.close(ours)
        pool.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""KV caches on a machine with a GPU: time to the first token with a long stored prefix, and restore bandwidth. Run by hand; under four minutes.

    pip install --no-deps nvtier-*.whl
    python3 bindings/python/tests/kv_gpu_check.py [--device cuda:0] [--dir FOLDER] [--shape 3b] [--tokens 32768] [--rounds 3] [--out FILE]
    python3 bindings/python/tests/kv_gpu_check.py --small            # on the host, to work on this file; its figures mean nothing

Needs torch and transformers. The model is of Llama-3-8B's shape, or Llama-3.2-3B's, with random weights in bf16. Rows are measured in turn, round after round; medians are
told. The last line is JSON. Exit code 1: restored bytes were not what was saved, or it broke. No name of a test: pytest leaves it.
"""

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

LIMIT_S = 235
MIB = 1 << 20

#: Models by name: sizes of layers and their number, as of Llama 3 8B and Llama 3.2 3B; ``tiny`` is for the host.
SHAPES = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
    "3b": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, vocab_size=128256),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dir", default=None, help="a folder on the drive to measure (default: a temporary one)")
    parser.add_argument("--tokens", type=int, default=None, help="tokens of the prefix (default: 32768; 1024 with --small)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ram", type=int, default=None, help="bytes of pinned memory for blocks (default: the prefix and a quarter)")
    parser.add_argument("--shape", choices=["8b", "3b"], default="8b", help="of the model")
    parser.add_argument("--small", action="store_true", help="a tiny model on the host")
    parser.add_argument("--out", default=None, help="write the JSON report there as well")
    return parser.parse_args()


def make_model(torch, transformers, shape, device, tokens):
    from transformers.initialization import no_init_weights

    small = shape == "tiny"
    config = transformers.LlamaConfig(
        **SHAPES[shape], max_position_embeddings=tokens + 4096, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, bos_token_id=1, eos_token_id=None
    )
    kind = torch.float32 if small else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        with torch.device(device), no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02 if not small else 0.15, generator=generator)
            else:
                parameter.fill_(1.0)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.eval()


class Clock:
    def __init__(self, torch, device):
        self.torch, self.cuda = torch, device.startswith("cuda")

    def __call__(self, run):
        if self.cuda:
            self.torch.cuda.synchronize()
        begun = time.perf_counter()
        value = run()
        if self.cuda:
            self.torch.cuda.synchronize()
        return time.perf_counter() - begun, value


def drive_ceiling(folder, size):
    """Bytes a second of the drive by `nvtier bench`, or why not."""
    program = os.environ.get("NVTIER_BIN")
    if not program:
        return None, "NVTIER_BIN is not set"
    command = [
        program, "bench", "--name=ceiling", f"--filename={folder / 'ceiling'}", "--rw=read", "--bs=1m", "--iodepth=32", "--direct=1",
        "--ioengine=io_uring", f"--size={size}", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        return None, f"nvtier bench: {done.stderr.strip()[-300:]}"
    return json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"], None


def main():
    args = arguments()
    # It must not hold a machine: whatever hangs ends here.
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"kv_gpu_check: not through after {LIMIT_S} s"))
    signal.alarm(LIMIT_S)
    import torch
    import transformers

    import nvtier

    device = "cpu" if args.small else args.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("kv_gpu_check: there is no CUDA device here; --small works without")
    tokens = args.tokens or (1024 if args.small else 32768)
    clock = Clock(torch, device)
    spent, model = clock(lambda: make_model(torch, transformers, "tiny" if args.small else args.shape, device, tokens))
    print(f"model made in {spent:.1f} s", flush=True)
    config = model.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    token_bytes *= model.dtype.itemsize
    prefix_bytes = tokens * token_bytes
    ram = args.ram or max(int(prefix_bytes * 1.25), 64 * MIB)
    torch.manual_seed(2)
    ids = torch.randint(2, config.vocab_size, (1, tokens + 16), device=device)
    mask = torch.ones_like(ids)
    report = {
        "device": device, "model": "tiny" if args.small else f"llama-{args.shape} shape", "tokens": tokens, "kv_bytes": prefix_bytes, "rounds": args.rounds,
        "torch": torch.__version__, "transformers": transformers.__version__, "nvtier": nvtier.__version__,
    }  # fmt: skip
    if device.startswith("cuda"):
        report["gpu"] = torch.cuda.get_device_name(device)

    with tempfile.TemporaryDirectory(prefix="nvtier-kv-", dir=args.dir) as folder:
        folder = pathlib.Path(folder)
        nvtier.format(folder / "pool")
        with nvtier.kv.Store(folder / "pool", ram=ram, budget=2 * prefix_bytes + 512 * MIB, deadline=60.0) as store:
            spent, auto = clock(lambda: nvtier.transformers.PrefixCache(model, store, chunk_tokens=32768, deadline=60.0))
            report["fingerprint_seconds"] = spent
            print(f"weights fingerprinted in {spent:.1f} s", flush=True)
            load = nvtier.transformers.PrefixCache(model, store, plan="load", chunk_tokens=32768, deadline=60.0)
            space = load.namespace()
            keys = load._keys(space, ids[0].tolist())
            first, cache = clock(lambda: auto.prefill(ids))
            saving, saved = clock(lambda: auto.save(cache, ids))
            space.flush()
            assert saved >= tokens // 16, f"{saved} blocks were saved: {space.trouble}"
            report["save_bytes_per_second"] = saved * auto._block_bytes / saving
            print(f"computed in {first:.2f} s, saved {saved} blocks in {saving:.1f} s", flush=True)
            whole = saved * 16

            # Restored bytes are the saved ones, bit for bit, by either way.
            wrong = []
            for name in ("memory", "drive"):
                if name == "drive":
                    space.forget(keys)
                back = load.prefill(ids)
                for index, (mine, theirs) in enumerate(zip(cache.layers, back.layers)):
                    for a, b in zip(mine._buffers, theirs._buffers):
                        if not torch.equal(a[:, :, :whole].view(torch.uint8), b[:, :, :whole].view(torch.uint8)):
                            wrong.append(f"layer {index} from {name}")
                del back
            report["wrong"] = wrong
            del cache

            def one_token(run):
                return run(max_new_tokens=1, do_sample=False)

            def forget_and(run):
                space.forget(keys)
                return clock(lambda: one_token(run))[0]

            def warm_and(run):
                if not all(space.in_memory(keys[: whole // 16 - 1])):
                    load.prefill(ids)
                return clock(lambda: one_token(run))[0]

            rows = {
                "recompute": lambda: clock(lambda: one_token(lambda **o: model.generate(ids, attention_mask=mask, **o)))[0],
                "load from drive": lambda: forget_and(lambda **o: load.generate(ids, **o)),
                "compute or load, drive": lambda: forget_and(lambda **o: auto.generate(ids, **o)),
                "load from memory": lambda: warm_and(lambda **o: load.generate(ids, **o)),
                "compute or load, memory": lambda: warm_and(lambda **o: auto.generate(ids, **o)),
            }
            # Restores alone, and the ceilings beside them.
            planes_cache = nvtier.transformers.KvCache(config)
            planes_cache.reserve(tokens + 16, load._samples)
            planes = planes_cache.planes(16)
            count = whole // 16

            def restore():
                return clock(lambda: space.get(keys[:count], planes, deadline=60.0))

            def restore_rate(name):
                if name == "drive":
                    space.forget(keys)
                spent, got = restore()
                assert all(one in nvtier.kv.HITS for one in got), space.trouble
                return count * load._block_bytes / spent

            pinned = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=device.startswith("cuda"))
            there = torch.empty(256 * MIB, dtype=torch.uint8, device=device)

            def copy_ceiling():
                repeats = 4
                spent, _ = clock(lambda: [there.copy_(pinned, non_blocking=True) for _ in range(repeats)])
                return repeats * pinned.numel() / spent

            rates = {"restore from drive": lambda: restore_rate("drive"), "restore from memory": lambda: restore_rate("memory"), "copy ceiling": copy_ceiling}
            ceiling, why = drive_ceiling(folder, min(prefix_bytes, 1 << 30))
            if why:
                report["drive_ceiling_skipped"] = why
                print(f"no ceiling of the drive: {why}", flush=True)
            else:
                rates["drive ceiling"] = lambda: drive_ceiling(folder, min(prefix_bytes, 1 << 30))[0]
            times = {name: [] for name in rows}
            bandwidth = {name: [] for name in rates}
            splits = []
            for round in range(args.rounds + 1):
                for name, run in rows.items():
                    seconds = run()
                    # The first round warms up: allocator, kernels, and what the planner knows.
                    if round:
                        times[name].append(seconds)
                        if name.startswith("compute or load"):
                            splits.append({"row": name, **auto.last})
                for name, run in rates.items():
                    rate = run()
                    if round:
                        bandwidth[name].append(rate)
            report["seconds"], report["bytes_per_second"], report["splits"] = times, bandwidth, splits
            for row in ("compute or load, drive", "compute or load, memory"):
                parts = {
                    part: statistics.median(split[part] for split in splits if split["row"] == row)
                    for part in ("prepare_seconds", "restore_seconds", "prefill_seconds", "generate_seconds")
                }
                report.setdefault("parts", {})[row] = parts
                print(f"{row}: " + ", ".join(f"{part.split('_')[0]} {seconds:.3f} s" for part, seconds in parts.items()), flush=True)
            for kind, start, end, begun, spent in next(split["steps"] for split in reversed(splits) if split["row"].endswith("drive")):
                print(f"  {begun:7.3f} s  {kind:8}{start:6} to {end:6}  {spent:.3f} s", flush=True)
            planner = auto.planner
            report["planner"] = {"compute": planner.compute_seconds(0, tokens), "drive": planner.load_seconds(prefix_bytes)}

    median = {name: statistics.median(values) for name, values in times.items()}
    rate = {name: statistics.median(values) for name, values in bandwidth.items()}
    report["median_seconds"], report["median_bytes_per_second"] = median, rate
    print(f"\nTIME TO FIRST TOKEN, prefix of {tokens} tokens ({prefix_bytes / 1e9:.2f} GB), median of {args.rounds}")
    for name, seconds in median.items():
        print(f"{name:26} {seconds:8.3f} s   {seconds / median['recompute']:6.2f} of recompute")
    better = min(median["recompute"], median["load from drive"])
    report["compute_or_load_of_better"] = median["compute or load, drive"] / better
    print(f"compute or load from the drive takes {report['compute_or_load_of_better']:.2f} of the better of the two alone\n\nBANDWIDTH")
    for name, value in rate.items():
        print(f"{name:26} {value / 1e9:8.2f} GB/s")
    print("restored bytes: " + (f"WRONG: {', '.join(wrong)}" if wrong else "all as saved"))
    text = json.dumps(report)
    if args.out:
        pathlib.Path(args.out).write_text(text)
    print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

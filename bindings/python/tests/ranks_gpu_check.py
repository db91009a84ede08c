"""nvtier.train with a rank a GPU, over NCCL: bit for bit DistributedDataParallel, and how long a step takes with one rank and with all of them.

    torchrun --standalone --nproc-per-node 2 ranks_gpu_check.py --dir DIR [--dir DIR2] --out FILE [--layers 16] [--hidden 2048] [--ffn 8192] [--batch 4]
        [--seq 2048] [--steps 4] [--ram 64GiB]

Each rank has a pool of its own below a DIR: the first rank below the first, and so on, round and round. All of it is removed in the end. Rank 0 prints JSON,
a line a result, and writes all of them to FILE; the exit code is 1 where something differs. Needs torch and transformers; without CUDA devices it runs over
gloo on the CPU, which shows that the script works and nothing about speed.
"""

import argparse
import contextlib
import copy
import datetime
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import nvtier  # noqa: E402
import nvtier.train  # noqa: E402

ADAMW = dict(lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


class Here:
    """This rank."""

    def __init__(self, folder):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        self.folder = folder
        self.alone = [dist.new_group([rank]) for rank in range(self.world)][self.rank]

    @contextlib.contextmanager
    def pool(self):
        path = os.path.join(self.folder, "pool")
        nvtier.format(path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def say(self, found):
        if self.rank == 0:
            print(json.dumps(found), flush=True)

    def all(self, what):
        told = [None] * self.world
        dist.all_gather_object(told, what)
        return told

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def autocast(self, enabled):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)


def exact(here):
    """Small models, one micro-batch a step: losses, weights and moments of every precision beside DistributedDataParallel, bit for bit (with two ranks: the sum
    of more depends on the order, which is NCCL's). Then clipping: the norm of the same gradients, which is a sum in another order."""
    torch.use_deterministic_algorithms(True)
    found = []
    for precision, tie in [("fp32", True), ("mixed", False), ("mixed", True), ("bf16", False)]:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1031,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=tie,
            attn_implementation="eager",
        )
        reference = LlamaForCausalLM(config).to(here.device).train()
        reference.config.use_cache = False
        reference.gradient_checkpointing_enable({"use_reentrant": False})
        if precision == "bf16":
            reference = reference.bfloat16()
        model = copy.deepcopy(reference)
        if here.rank:
            # Rank 0's are those that all begin with.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
        needs = nvtier.train.plan(model, precision=precision, accumulate=False, ranks=here.world)
        whole = nvtier.train.plan(model, precision=precision, accumulate=False)

        def batch(step):
            return torch.randint(0, 1031, (2, 64), generator=torch.Generator().manual_seed(100 * step + here.rank)).to(here.device)

        def run(model, optimizer, steps=12):
            seen = []
            for step in range(steps):
                ids = batch(step)
                with here.autocast(precision == "mixed"):
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                seen.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
            return seen

        with here.pool() as pool:
            model, optimizer = nvtier.train.offload(
                model, torch.optim.AdamW, pool=pool, precision=precision, vram=needs["least_vram"], ram="1MiB", accumulate=False, **ADAMW
            )
            parallel = torch.nn.parallel.DistributedDataParallel(reference)
            wanted, seen = run(parallel, plain), run(model, optimizer)
            parameters = dict(reference.named_parameters())
            weights = sum(int((weight.to(here.device) != parameters[name]).sum()) for name, weight in optimizer.weights())
            moments = 0
            for name, steps, m, v in optimizer.moments():
                state = plain.state[parameters[name]]
                moments += int((m.to(here.device) != state["exp_avg"]).sum()) + int((v.to(here.device) != state["exp_avg_sq"]).sum())
                moments += steps != int(state["step"])
            stats = optimizer.stats()
            norms = []
            for one, clip in ((parallel, lambda: torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)), (model, lambda: optimizer.clip_grad_norm_(0.5))):
                ids = batch(77)
                with here.autocast(precision == "mixed"):
                    one(input_ids=ids, labels=ids).loss.backward()
                norms.append(float(clip()))
            optimizer.zero_grad()
            optimizer.close()
        one = {
            "check": "exact",
            "precision": precision,
            "tied": tie,
            "ranks": here.world,
            "losses_equal": all(here.all(seen == wanted)),
            "weights_different": max(here.all(weights)),
            "moments_different": max(here.all(moments)),
            "peak_within_budget": all(here.all(stats["device_peak_bytes"] <= needs["least_vram"])),
            "state_bytes_of_a_rank": needs["state"],
            "state_bytes_of_one_process": whole["state"],
            "norms": norms,
            # bfloat16 norms are bfloat16 in plain PyTorch.
            "norm_is_close": abs(norms[0] - norms[1]) <= (1e-2 if precision == "bf16" else 1e-5) * norms[0],
        }
        one["fine"] = one["losses_equal"] and one["peak_within_budget"] and one["norm_is_close"] and one["weights_different"] == one["moments_different"] == 0
        here.say(one)
        found.append(one)
    torch.use_deterministic_algorithms(False)
    return found


def speed(here, options):
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(options.hidden // 256, 1),
        tie_word_embeddings=False,
    )
    ids = torch.randint(0, 32000, (options.batch, options.seq), generator=torch.Generator().manual_seed(here.rank)).to(here.device)

    def fresh():
        torch.manual_seed(0)
        with here.device:
            model = LlamaForCausalLM(config)
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def steps(model, optimizer):
        times = []
        for _ in range(options.steps):
            here.wait()
            start = time.perf_counter()
            with here.autocast(True):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            here.wait()
            times.append(time.perf_counter() - start)
        return times

    def run(ranks, ram, every):
        model = fresh()
        needs = nvtier.train.plan(model, precision="mixed", accumulate=False, ranks=ranks)
        with here.pool() as pool:
            model, optimizer = nvtier.train.offload(
                model,
                torch.optim.AdamW,
                pool=pool,
                precision="mixed",
                ram=ram,
                vram=max(3 << 30, needs["least_vram"]),
                accumulate=False,
                commit_every=every,
                group=here.alone if ranks == 1 else None,
                **ADAMW,
            )
            if here.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            before = optimizer.stats()
            times = steps(model, optimizer)
            after = optimizer.stats()
            # A state in host memory is not written just to be removed.
            optimizer.close() if ram == 0 else optimizer.__exit__(KeyboardInterrupt, None, None)
        return {
            "seconds": times,
            "median_seconds": statistics.median(times[1:] or times),
            "state_peak_gb": after["device_peak_bytes"] / 1e9,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if here.cuda else None,
            "needs": needs,
            "per_step": {key: (after[key] - before[key]) / options.steps for key in after if key.endswith("bytes") and "device" not in key},
        }

    found = []
    for where, ram, every in (("drive", 0, 1), ("ram", options.ram, 1000)):
        for ranks in sorted({1, here.world}):
            # The others leave the drive alone.
            mine = run(ranks, ram, every) if here.rank < ranks else None
            dist.barrier()
            told = [one for one in here.all(mine) if one is not None]
            slowest = max(one["median_seconds"] for one in told)
            one = {
                "check": "speed",
                "state_in": where,
                "ranks": ranks,
                "median_seconds": slowest,
                "tokens_per_second": ranks * options.batch * options.seq / slowest,
                "of_each_rank": told,
                "fine": True,
            }
            here.say(one)
            found.append(one)
            if here.cuda:
                torch.cuda.empty_cache()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True, action="append")
    parser.add_argument("--out", required=True)
    parser.add_argument("--ram", default="64GiB", help="pinned memory of each rank in the second part of the times")
    for name, default in (("layers", 16), ("hidden", 2048), ("ffn", 8192), ("batch", 4), ("seq", 2048), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit("ranks_gpu_check: run it by torchrun --standalone --nproc-per-node 2")
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        if local >= torch.cuda.device_count():
            raise SystemExit(f"ranks_gpu_check: {torch.cuda.device_count()} CUDA devices, and rank {local} needs another")
        torch.cuda.set_device(local)
    # One rank at a time has the drive in a part of it.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=20), device_id=torch.device("cuda", local) if cuda else None)
    folder = tempfile.mkdtemp(dir=options.dir[local % len(options.dir)])
    here = Here(folder)
    found = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if cuda else "cpu", "ranks": here.world, "model": vars(options)}
    code = 1
    try:
        found["exact"] = exact(here)
        found["speed"] = speed(here, options)
        code = 0 if all(one["fine"] for one in [*found["exact"], *found["speed"]]) else 1
    except Exception as error:
        found["error"] = f"rank {here.rank}: {type(error).__name__}: {error}"
        traceback.print_exc()
        here.say({"error": found["error"]})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if here.rank == 0:
            with open(options.out, "w", encoding="utf-8") as file:
                json.dump(found, file, indent=1)
    if code == 0:
        dist.destroy_process_group()
    else:
        # The others may be waiting for what does not come: torchrun ends them.
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""One engine of vLLM, as its server has it, for `vllm_serve.py`: takes an order, one line of JSON, on its standard input. Says READY when vLLM is
imported, RESULT and what came of it as JSON, and CLOSED when the engine is."""

import asyncio
import json
import logging
import os
import sys
import time

COUNTED = ("nvtier_", "external_prefix_cache", "prefix_cache_", "num_preemptions", "kv_offload")
STORED = ("stored", "present", "refused", "store_failed")


def ids_of(spec, model):
    """A prompt's tokens: random ones that end like all of its kind, or of text."""
    if "files" in spec:
        from transformers import AutoTokenizer

        text = "".join(open(path, encoding="utf-8").read() for path in spec["files"])
        return AutoTokenizer.from_pretrained(model)(text)["input_ids"][spec["skip"] : spec["skip"] + spec["length"]]
    import numpy as np

    def draw(seed, count):
        return np.random.default_rng(seed).integers(3, spec["vocabulary"], count).tolist()

    shared = spec.get("shared", 0)
    head = draw(spec["group"], shared) if shared else []
    return head + draw(spec["seed"], spec["length"] - spec["tail"] - shared) + draw(0, spec["tail"])


def counts():
    from vllm.v1.metrics.reader import get_metrics_snapshot

    found = {}
    for metric in get_metrics_snapshot():
        name = metric.name.removeprefix("vllm:")
        if name.startswith(COUNTED) and hasattr(metric, "value"):
            found[name] = found.get(name, 0) + metric.value
    return found


class Server:
    """An engine in a process of its own, and this process asks it."""

    def __init__(self, order):
        from vllm import AsyncEngineArgs
        from vllm.config import KVTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        transfer = None if order["transfer"] is None else KVTransferConfig(**order["transfer"])
        arguments = AsyncEngineArgs(
            **order["engine"], enforce_eager=True, block_size=16, disable_log_stats=False, skip_tokenizer_init=True, seed=0, kv_transfer_config=transfer
        )
        self.engine = AsyncLLM.from_engine_args(arguments)
        self.prompts = {name: ids_of(spec, order["engine"]["model"]) for name, spec in order["prompts"].items()}
        self.prompts[""] = [1, 2]
        self.number = 0

    async def one(self, name, tokens):
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=1)
        self.number += 1
        begun, first, output = time.perf_counter(), None, None
        async for output in self.engine.generate({"prompt_token_ids": self.prompts[name]}, params, f"r{self.number}"):
            if first is None and output.outputs[0].token_ids:
                first = time.perf_counter() - begun
        answer = output.outputs[0]
        return {
            "name": name,
            "tokens": list(answer.token_ids),
            "logprobs": [step[token].logprob for step, token in zip(answer.logprobs or (), answer.token_ids)],
            "prompt": len(output.prompt_token_ids),
            "cached": output.num_cached_tokens or 0,
            "ttft": first,
            "seconds": time.perf_counter() - begun,
        }

    async def wave(self, names, tokens):
        return await asyncio.gather(*(self.one(name, tokens) for name in names))


async def run(order, imported):
    begun = time.perf_counter()
    server = Server(order)
    try:
        made = time.perf_counter()
        waves = [await server.wave(wave["prompts"], wave["tokens"]) for wave in order["waves"]]
        through = time.perf_counter()
        found = counts()
        # Blocks are stored beside the steps, and told with the next step.
        prefix = order["prefix"]
        while prefix and sum(found.get(prefix + name, 0) for name in STORED) < order["stored"]:
            if time.perf_counter() - through > order["patience"]:
                break
            await server.one("", 2)
            await asyncio.sleep(0.02)
            found = counts()
        config = server.engine.vllm_config
        result = {
            "versions": versions(),
            "waves": waves,
            "counts": found,
            "runner": "V2" if getattr(config, "use_v2_model_runner", False) else "V1",
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "seconds": {"import": imported, "engine": made - begun, "waves": through - made, "stores": time.perf_counter() - through},
        }
        if order.get("decode"):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(order["engine"]["model"])
            result["texts"] = [[tokenizer.decode(one["tokens"]) for one in wave] for wave in waves]
        say("RESULT " + json.dumps(result))
    finally:
        # Whoever comes next opens the pool: the engine's process is to be gone by then.
        server.engine.shutdown(timeout=30)
    say("CLOSED")


def versions():
    import torch
    import transformers
    import vllm
    from vllm.platforms import current_platform

    import nvtier

    return {
        "vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__, "nvtier": nvtier.__version__,
        "python": sys.version.split()[0], "device": current_platform.get_device_name(),
    }  # fmt: skip


def say(line):
    print(line, flush=True)


def main():
    begun = time.perf_counter()
    # nvtier says how blocks lie; vLLM's own log has lines of its own alone.
    told = logging.StreamHandler()
    told.setFormatter(logging.Formatter("%(name)s %(message)s"))
    logging.getLogger("nvtier").addHandler(told)
    logging.getLogger("nvtier").setLevel(logging.INFO)
    import vllm.v1.engine.async_llm  # noqa: F401

    # What the engine's process, a fork of this one, imports when it is made. Not all versions have all of it, and none of it is needed here.
    for module in (
        "transformers.models.llama", "vllm.model_executor.models.llama", "vllm.model_executor.model_loader.default_loader", "vllm.v1.core.sched.scheduler",
        "vllm.v1.engine.core", "vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu.model_runner", "vllm.v1.attention.backends.flash_attn", "nvtier.torch",
        "nvtier._vllm_connector", "nvtier._vllm_tier",
    ):  # fmt: skip
        if os.environ.get("NVTIER_NOT_AHEAD"):
            break
        try:
            __import__(module)
        except Exception as error:
            print(f"not imported ahead: {module}: {error!r}", file=sys.stderr, flush=True)
    imported = time.perf_counter() - begun
    say("READY")
    line = sys.stdin.readline()
    if line.strip():
        asyncio.run(run(json.loads(line), imported))


if __name__ == "__main__":
    main()

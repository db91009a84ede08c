"""An engine of vLLM with nvtier's connector or without: `python vllm_engine.py JSON`. Prints tokens and counts as one line of JSON.

`server`: as vLLM's server has it, with a process that schedules and one that computes; otherwise all of it is in this process."""

import asyncio
import json
import os
import sys

#: Times that counts are looked at: each after a request that is too short for a block.
LOOKS = 200
COUNTS = ("stored", "present", "refused", "store_failed")


def metrics():
    from vllm.v1.metrics.reader import get_metrics_snapshot

    found = {}
    for metric in get_metrics_snapshot():
        name = metric.name.removeprefix("vllm:")
        if name.startswith(("nvtier_connector_", "external_prefix_cache", "num_preemptions")):
            found[name.removeprefix("nvtier_connector_")] = int(metric.value)
    return found


def arguments(order):
    from vllm.config import KVTransferConfig

    transfer = None
    if order["extra"] is not None:
        transfer = KVTransferConfig(
            kv_connector="NvtierConnector",
            kv_role="kv_both",
            kv_connector_module_path="nvtier.vllm",
            kv_connector_extra_config=order["extra"],
        )
    return {
        "model": order["model"],
        "dtype": "float32",
        "max_model_len": order.get("max_model_len", 512),
        "enforce_eager": True,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 512,
        "block_size": 16,
        "kv_transfer_config": transfer,
        "enable_prefix_caching": order.get("prefix_caching", False),
        "num_gpu_blocks_override": order.get("blocks"),
        "disable_log_stats": False,
        **({"enable_lora": True, "max_lora_rank": 8, "max_loras": len(order["adapters"])} if order.get("adapters") else {}),
    }


def adapter(order, name):
    """A LoRA adapter by its name; numbers are in the order of the names."""
    if name is None:
        return None
    from vllm.lora.request import LoRARequest

    adapters = order["adapters"]
    return LoRARequest(name, 1 + sorted(adapters).index(name), adapters[name])


def pad(request):
    """Prompt, tenant, name of an adapter."""
    return (*request, None, None)[:3]


def params(tenant, tokens):
    from vllm import SamplingParams

    extra = {"kv_transfer_params": {"tenant": tenant}} if tenant else None
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)


def answer(output):
    return {"tokens": list(output.outputs[0].token_ids), "prompt": len(output.prompt_token_ids), "cached": output.num_cached_tokens or 0}


class Offline:
    def __init__(self, order):
        from vllm import LLM

        self.engine = LLM(**arguments(order))
        self.order = order

    async def wave(self, requests, tokens):
        prompts, tenants, adapters = zip(*(pad(request) for request in requests))
        loras = [adapter(self.order, name) for name in adapters]
        lora = {"lora_request": loras} if any(loras) else {}
        outputs = self.engine.generate(list(prompts), [params(tenant, tokens) for tenant in tenants], use_tqdm=False, **lora)
        return [answer(output) for output in outputs]

    async def reset(self):
        # vLLM says no while blocks are being stored, and sees that they are with its next step.
        for _ in range(LOOKS):
            if self.engine.reset_prefix_cache(reset_connector=True):
                return
            await self.wave([("Hi", None)], 2)
        raise RuntimeError("the cache is not reset")

    def close(self):
        self.engine.llm_engine.engine_core.shutdown()


class Server:
    def __init__(self, order):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments(order)))
        self.order = order
        self.number = 0

    async def _one(self, prompt, tenant, name, tokens):
        self.number += 1
        lora = adapter(self.order, name)
        async for output in self.engine.generate(prompt, params(tenant, tokens), f"r{self.number}", lora_request=lora):
            last = output
        return answer(last)

    async def wave(self, requests, tokens):
        return await asyncio.gather(*(self._one(*pad(request), tokens) for request in requests))

    def close(self):
        self.engine.shutdown()


async def run(order):
    engine = (Server if order["server"] else Offline)(order)
    try:
        waves = []
        for number, wave in enumerate(order["waves"]):
            if number == order.get("reset_before"):
                await engine.reset()
            waves.append(await engine.wave(wave, order["tokens"]))
        # Blocks are stored beside the steps, and counted with the next step.
        wanted = sum(one["prompt"] // 16 for wave in waves for one in wave)
        counts = metrics()
        for _ in range(LOOKS if order["extra"] is not None else 0):
            if sum(counts.get(name, 0) for name in COUNTS) >= wanted:
                break
            await engine.wave([("Hi", None)], 2)
            counts = metrics()
        return {"waves": waves, "counts": counts}
    finally:
        engine.close()


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    os.environ.update(
        HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS="2", VLLM_ENABLE_V1_MULTIPROCESSING="1" if order["server"] else "0",
    )  # fmt: skip
    print("RESULT " + json.dumps(asyncio.run(run(order))), flush=True)

"""An engine of vLLM's server, with nvtier's connector or without: `python vllm_engine.py JSON`. Prints tokens and counts as one line of JSON."""

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


async def serve(order):
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    transfer = None
    if order["extra"] is not None:
        transfer = KVTransferConfig(
            kv_connector="NvtierConnector",
            kv_role="kv_both",
            kv_connector_module_path="nvtier.vllm",
            kv_connector_extra_config=order["extra"],
        )
    args = AsyncEngineArgs(
        model=order["model"], dtype="float32", max_model_len=512, enforce_eager=True, max_num_seqs=4, max_num_batched_tokens=512,
        block_size=16, kv_transfer_config=transfer, enable_prefix_caching=order.get("prefix_caching", False),
        num_gpu_blocks_override=order.get("blocks"),
    )  # fmt: skip
    engine = AsyncLLM.from_engine_args(args)

    async def generate(number, prompt, tenant, tokens):
        extra = {"kv_transfer_params": {"tenant": tenant}} if tenant else None
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)
        async for output in engine.generate(prompt, params, f"r{number}"):
            last = output
        return {
            "tokens": list(last.outputs[0].token_ids),
            "prompt": len(last.prompt_token_ids),
            "cached": last.num_cached_tokens or 0,
        }

    try:
        done, number = [], 0
        for wave in order["waves"]:
            requests = []
            for prompt, tenant in wave:
                number += 1
                requests.append(generate(number, prompt, tenant, order["tokens"]))
            done.append(await asyncio.gather(*requests))
        # Blocks are stored beside the steps, and counted with the next step.
        wanted = sum(answer["prompt"] // 16 for wave in done for answer in wave)
        for _ in range(LOOKS if transfer is not None else 1):
            number += 1
            await generate(number, "Hi", None, 2)
            counts = metrics()
            if sum(counts.get(name, 0) for name in COUNTS) >= wanted:
                break
        return {"waves": done, "counts": counts}
    finally:
        engine.shutdown()


if __name__ == "__main__":
    os.environ.update(
        HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS="2",
    )  # fmt: skip
    print("RESULT " + json.dumps(asyncio.run(serve(json.loads(sys.argv[1])))), flush=True)

"""Time of a step of DeepSpeed ZeRO-3 with parameters and optimizer on a drive: the model, batch and numbers of train_gpu_check.py, for the same run beside it.

    train_peer.py --dir DIR --out FILE [--layers 16] [--hidden 2048] [--ffn 8192] [--batch 4] [--seq 2048] [--steps 3] [--cap 8]

Needs DeepSpeed with its asynchronous I/O (libaio and its headers, nvcc; it is compiled at first use), torch, transformers and a CUDA device. Set
TORCH_CUDA_ARCH_LIST to the device's, and DS_SKIP_CUDA_CHECK=1 where CUDA's minor versions differ. Its pipelined reads and writes fail with these buffers in
0.19.8, and are left off.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")

VOCABULARY = 32000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--out", required=True)
    for name, default in (("layers", 16), ("hidden", 2048), ("ffn", 8192), ("batch", 4), ("seq", 2048), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cap", type=float, default=0, help="GiB on the device for all of it; 0: no cap")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which no further step is begun")
    options = parser.parse_args()

    import deepspeed
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    begun = time.perf_counter()
    if options.cap:
        torch.cuda.set_per_process_memory_fraction(options.cap * (1 << 30) / torch.cuda.get_device_properties(0).total_memory)
    folder = tempfile.mkdtemp(dir=options.dir)
    largest = max(VOCABULARY, options.ffn) * options.hidden
    nvme = {"device": "nvme", "nvme_path": folder, "pin_memory": True}
    config = {
        "train_micro_batch_size_per_gpu": options.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
        "aio": {"block_size": 1 << 20, "queue_depth": 32, "intra_op_parallelism": 4, "single_submit": False, "overlap_events": True},
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 100_000_000,
            "offload_optimizer": {**nvme, "buffer_count": 5},
            "offload_param": {**nvme, "buffer_count": 48, "buffer_size": int(largest * 1.07), "max_in_cpu": 0},
        },
    }
    found = {"deepspeed": deepspeed.__version__, "model": vars(options), "steps": []}
    try:
        deepspeed.init_distributed()
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=options.hidden,
                    intermediate_size=options.ffn,
                    num_hidden_layers=options.layers,
                    num_attention_heads=options.hidden // 64,
                    num_key_value_heads=8,
                    vocab_size=VOCABULARY,
                    tie_word_embeddings=False,
                )
            )
        model.config.use_cache = False
        model.gradient_checkpointing_enable()
        found["parameters"] = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        found["begin_seconds"] = time.perf_counter() - begun
        print(json.dumps(found), flush=True)
        ids = torch.randint(0, VOCABULARY, (options.batch, options.seq), device="cuda", generator=torch.Generator("cuda").manual_seed(3))
        for _ in range(options.steps):
            if time.perf_counter() - begun > options.limit:
                break
            marks = []

            def mark():
                torch.cuda.synchronize()
                marks.append(time.perf_counter())

            mark()
            loss = engine(input_ids=ids, labels=ids).loss
            mark()
            engine.backward(loss)
            mark()
            engine.step()
            mark()
            one = {name: marks[at + 1] - marks[at] for at, name in enumerate(("forward", "backward", "update"))}
            one.update(total=marks[-1] - marks[0], peak_gb=torch.cuda.max_memory_allocated() / 1e9)
            print(json.dumps(one), flush=True)
            found["steps"].append(one)
        later = [one["total"] for one in found["steps"][1:]] or [one["total"] for one in found["steps"]]
        found["median_seconds"] = statistics.median(later) if later else None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()

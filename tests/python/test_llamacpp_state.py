"""llama.cpp's state calls from Python (cyllama): a state is written to the mount and read back, by the library itself and as bytes."""

import hashlib

import pytest

from conftest import in_child

llama = pytest.importorskip("cyllama.llama.llama_cpp")

PROMPT = "A pool on a solid-state drive holds models, caches and training state. " * 8 + "In short, it is"
NEW = 8


def states(model, folder):
    """Evaluates a prompt, saves the state, and goes on with it in contexts that know nothing else."""
    folder.mkdir(exist_ok=True)
    llama.llama_backend_init()
    model_params = llama.LlamaModelParams()
    model_params.n_gpu_layers = 0
    loaded = llama.LlamaModel(str(model), model_params, False)
    mapped = [line.split()[1] for line in open("/proc/self/maps") if line.rstrip().endswith(str(model))]
    tokens = loaded.get_vocab().tokenize(PROMPT, True, True)

    greedy = llama.LlamaSampler()
    greedy.add_greedy()

    def context():
        params = llama.LlamaContextParams()
        params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 1024, 512, 2, 2
        return llama.LlamaContext(loaded, params, False)

    def go_on(context):
        found, last = [], tokens[-1]
        for at in range(len(tokens) - 1, len(tokens) - 1 + NEW):
            context.decode(llama.llama_batch_get_one([last], at))
            last = greedy.sample(context, -1)
            found.append(last)
        return found

    first = context()
    first.decode(llama.llama_batch_get_one(tokens[:-1], 0))
    assert first.save_state_file(str(folder / "state.bin"), tokens[:-1])
    (folder / "sequence.bin").write_bytes(first.get_state_seq_data(0))
    expected = go_on(first)
    second = context()
    restored = second.load_state_file(str(folder / "state.bin"), 1024)
    third = context()
    third.set_state_seq_data((folder / "sequence.bin").read_bytes(), 0)
    # Without a state the prompt is not known: these would be other tokens.
    unknown = go_on(context())
    return {
        "mapped": mapped,
        "tokens": tokens[:-1] == list(restored),
        "expected": expected,
        "from_file": go_on(second),
        "from_bytes": go_on(third),
        "unknown": unknown,
        "files": [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("state.bin", "sequence.bin")],
    }


@pytest.fixture(scope="session")
def expected(model, scratch):
    """What the native file system gives."""
    return in_child(states, model / "model.gguf", scratch / "native-states")


def test_states_come_back(model_on_mount, mount, expected):
    got = in_child(states, model_on_mount / "model.gguf", mount / "states")
    assert got["mapped"] and all(mode.startswith("r--s") for mode in got["mapped"]), "the model was not mapped"
    assert got["tokens"] and len(got["expected"]) == NEW
    assert got["from_file"] == got["from_bytes"] == got["expected"]
    assert got["unknown"] != got["expected"], "a restored state would not be told from none"
    assert got == expected

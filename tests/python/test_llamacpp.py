"""llama.cpp (prebuilt, in process): a GGUF mapped from the mount, slots saved and restored there."""

import hashlib
import json
import urllib.request

import pytest

from conftest import in_child

xllamacpp = pytest.importorskip("xllamacpp")

PROMPT = "A pool on a solid-state drive holds models, caches and training state. " * 8 + "In short, it is"


def session(model, slots):
    """Completes twice, saves the slot, erases it, restores it, completes again."""
    slots.mkdir(exist_ok=True)
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = 1024
    params.n_parallel = 1
    params.cpuparams.n_threads = 2
    params.warmup = False
    params.endpoint_slots = True
    params.slot_save_path = f"{slots}/"
    server = xllamacpp.Server(params)
    mapped = [line.split()[1] for line in open("/proc/self/maps") if line.rstrip().endswith(str(model))]

    def post(path, body):
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            server.listening_address + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)

    ask = {"prompt": PROMPT, "n_predict": 16, "temperature": 0, "seed": 1, "id_slot": 0, "cache_prompt": True,
           "return_tokens": True}  # fmt: skip
    first = post("/completion", ask)
    # Asked again, the prompt comes from the slot's cache. (Its last token is then evaluated alone, which rounds
    # differently from evaluating it with the rest, so this may differ from the first answer, but not from itself.)
    warm = post("/completion", ask)
    saved = post("/slots/0?action=save", {"filename": "slot.bin"})
    post("/slots/0?action=erase", {})
    restored = post("/slots/0?action=restore", {"filename": "slot.bin"})
    second = post("/completion", ask)
    return {
        "mapped": mapped,
        "tokens": first["tokens"],
        "text": first["content"],
        "warm": warm["tokens"],
        "again": second["tokens"],
        "reused": second["timings"]["cache_n"],
        "saved": (saved["n_saved"], saved["n_written"]),
        "restored": (restored["n_restored"], restored["n_read"]),
        "file": hashlib.sha256((slots / "slot.bin").read_bytes()).hexdigest(),
    }


@pytest.fixture(scope="session")
def expected(model, scratch):
    """What the native file system gives."""
    return in_child(session, model / "model.gguf", scratch / "native-slots")


def test_same_tokens_and_slots(model_on_mount, mount, expected):
    got = in_child(session, model_on_mount / "model.gguf", mount / "slots")
    assert got["mapped"] and all(mode.startswith("r--s") for mode in got["mapped"]), "the model was not mapped"
    assert len(got["tokens"]) == 16
    assert got["again"] == got["warm"], "the restored slot continues differently"
    assert got["reused"] > 50, "the restored slot was not used"
    assert got == expected

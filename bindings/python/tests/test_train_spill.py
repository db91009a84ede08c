"""nvtier.train with activations in the pool and in host memory: the same numbers, fewer bytes on the device, nothing left behind."""

import copy
import gc

import pytest

import nvtier

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

import nvtier.train  # noqa: E402
import test_train as single  # noqa: E402
from test_train import ADAMW, VOCABULARY, compare, llama  # noqa: E402

one_thread, pool = single.one_thread, single.pool

LAYERS = 6
#: Of a micro-batch: the input of a layer is 6 x 48 x 64 x 4 bytes, more than the least that is moved.
SHAPE = (6, 48)
INPUT = 6 * 48 * 64 * 4


def train(model, optimizer, steps, precision, micro=2):
    seen = []
    for step in range(steps):
        for part in range(micro):
            ids = torch.randint(0, VOCABULARY, SHAPE, generator=torch.Generator().manual_seed(10 * step + part))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "mixed"):
                loss = model(input_ids=ids, labels=ids).loss / micro
            loss.backward()
            seen.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("precision,ram", [("fp32", 0), ("mixed", "100MiB"), ("fp32", "300KiB")])
def test_the_numbers_are_the_same_and_the_bytes_are_elsewhere(pool, precision, ram):
    reference = llama(layers=LAYERS, tie=False)
    model = copy.deepcopy(reference)
    for one in (reference, model):
        one.gradient_checkpointing_enable({"use_reentrant": False})
    plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
    torch.manual_seed(5)
    wanted = train(reference, plain, 3, precision)
    needs = nvtier.train.plan(model, precision=precision)
    model, optimizer = nvtier.train.offload(
        model, torch.optim.AdamW, pool=pool, precision=precision, vram=needs["least_vram"] + INPUT, activations="pool", activations_ram=ram, **ADAMW
    )
    torch.manual_seed(5)
    assert train(model, optimizer, 3, precision) == wanted
    compare(reference, plain, optimizer)
    gc.collect()
    optimizer._manager.spill.reap(wait=True)
    stats = optimizer.stats()
    # Each layer's input goes out and comes back, in each of six micro-batches; that of the last one stays, once it is known to be the last.
    moved = (LAYERS + 5 * (LAYERS - 1)) * INPUT
    assert stats["activations_stored_bytes"] == moved, stats
    # But for those that were wanted while they were on their way out: the latest two, each time.
    assert moved - 6 * 2 * INPUT <= stats["activations_fetched_bytes"] <= moved, stats
    assert stats["activations_stayed_bytes"] == 0
    # One that is used, one that comes, those on their way out.
    assert stats["activations_device_peak_bytes"] <= 4 * INPUT < LAYERS * INPUT, stats
    written = stats["activations_drive_written_bytes"]
    # Of the two blocks of 64 KiB that an input takes; some have a place in host memory, and are not written.
    blocks = moved // INPUT * 2 * (64 << 10)
    assert written == blocks if ram == 0 else written == 0 if ram == "100MiB" else written == blocks - 6 * 2 * 2 * (64 << 10), (written, blocks)
    manager = optimizer._manager
    assert manager.spill.held == 0 and manager.device_bytes - sum(spare.bytes for spare in manager._spare) <= needs["least_vram"]
    assert any(entry.path.endswith(".activations") for entry in pool.ls(".nvtier-kv"))
    optimizer.close()
    assert not any(entry.path.endswith(".activations") for entry in pool.ls(".nvtier-kv"))


def test_what_there_is_no_room_for_stays(pool):
    """And the model without checkpointing, of which only what crosses blocks is moved."""
    for checkpointing in (True, False):
        reference = llama(layers=LAYERS, tie=False)
        model = copy.deepcopy(reference)
        if checkpointing:
            for one in (reference, model):
                one.gradient_checkpointing_enable({"use_reentrant": False})
        plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
        torch.manual_seed(5)
        wanted = train(reference, plain, 2, "fp32")
        model, optimizer = nvtier.train.offload(
            model, torch.optim.AdamW, pool=pool, run=f"c{checkpointing}", activations=0, activations_ram="300KiB", **ADAMW
        )
        torch.manual_seed(5)
        assert train(model, optimizer, 2, "fp32") == wanted
        compare(reference, plain, optimizer)
        stats = optimizer.stats()
        if checkpointing:
            # Two inputs have room.
            assert stats["activations_stored_bytes"] == 4 * 2 * INPUT and stats["activations_stayed_bytes"] == (4 + 3 * 3) * INPUT, stats
        optimizer.close()


def test_what_makes_no_sense_is_refused(pool):
    def refused(kind, words, **options):
        with pytest.raises(kind) as error:
            nvtier.train.offload(llama(layers=2), torch.optim.AdamW, pool=pool, **ADAMW, **options)
        assert words in str(error.value)

    refused(nvtier.InvalidArgument, "20 apples", activations="20 apples")
    refused(nvtier.InvalidArgument, "activations='pool'", activations_ram="1MiB")
    refused(nvtier.NoSpace, "activations='900TiB'", activations="900TiB")
    model, optimizer = nvtier.train.offload(llama(layers=2), torch.optim.AdamW, pool=pool, activations="pool", **ADAMW)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, VOCABULARY, SHAPE)
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.close()
    with pytest.raises(nvtier.Closed, match="closed"):
        loss.backward()

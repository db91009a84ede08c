"""nvtier.train with step_in="backward": the numbers of plain PyTorch, gradients that never leave the device, and what such a run refuses."""

import copy

import pytest

import nvtier

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import nvtier.train  # noqa: E402
from test_train import ADAMW, compare, llama, one_thread, pool, train  # noqa: E402, F401


def offload(model, pool, **options):
    return nvtier.train.offload(model, torch.optim.AdamW, pool=pool, step_in="backward", **{**ADAMW, **options})


@pytest.mark.parametrize("precision,checkpointing,tied", [("fp32", True, True), ("mixed", True, False), ("mixed", False, True), ("bf16", True, False)])
def test_the_numbers_are_plain_pytorchs(pool, precision, checkpointing, tied):  # noqa: F811
    reference = llama(tie=tied, precision=precision)
    model = copy.deepcopy(reference)
    for one in (reference, model):
        if checkpointing:
            one.gradient_checkpointing_enable({"use_reentrant": False})
    plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(plain, 12)
    torch.manual_seed(5)
    wanted = train(reference, plain, 20, precision=precision, schedule=schedule)

    needs = nvtier.train.plan(model, precision=precision, step_in="backward")
    model, optimizer = offload(model, pool, precision=precision, vram=needs["least_vram"], ram="300KiB")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    torch.manual_seed(5)
    assert train(model, optimizer, 20, precision=precision, schedule=schedule) == wanted
    compare(reference, plain, optimizer)
    stats = optimizer.stats()
    assert stats["device_peak_bytes"] <= needs["least_vram"] < needs["state"] / 2, (stats, needs)
    # Gradients are no part of what is moved: each weight is read and written with both moments, and read once more to compute with.
    assert stats["stored_bytes"] <= 21 * needs["written"]
    optimizer.close()


def test_it_goes_on_after_its_last_commit(tmp_path):
    wanted_model = llama()
    plain = torch.optim.AdamW(wanted_model.parameters(), fused=True, **ADAMW)
    torch.manual_seed(5)
    wanted = train(wanted_model, plain, 8)

    nvtier.format(tmp_path / "pool")
    least = nvtier.train.plan(llama(), step_in="backward")["least_vram"]
    with nvtier.Pool(tmp_path / "pool") as opened:
        model, optimizer = offload(llama(), opened, vram=least)
        torch.manual_seed(5)
        assert train(model, optimizer, 4) == wanted[:4]
        optimizer.commit(wait=True)
        # Half a step more, which nobody finishes.
        ids = torch.arange(32).view(2, 16)
        model(input_ids=ids, labels=ids).loss.backward()
        with pytest.raises(nvtier.InvalidArgument, match="step 4"):
            optimizer.close()
    with nvtier.Pool(tmp_path / "pool") as opened:
        model, optimizer = offload(llama(seed=9), opened, vram=least, resume=True)
        assert optimizer.steps == 4
        assert train(model, optimizer, 8, first=4) == wanted[4:]
        compare(wanted_model, plain, optimizer)
        optimizer.close()


def test_what_it_cannot_do_is_refused(pool):  # noqa: F811
    model, optimizer = offload(llama(), pool)
    ids = torch.arange(32).view(2, 16)
    with pytest.raises(nvtier.NotSupported, match="clipping"):
        optimizer.clip_grad_norm_(1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(nvtier.InvalidArgument, match="step\\(\\) has to follow"):
        model(input_ids=ids)
    with pytest.raises(nvtier.InvalidArgument, match="step\\(\\) has to follow"):
        optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 1.0
    with pytest.raises(nvtier.InvalidArgument, match="param_groups were changed"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = ADAMW["lr"]
    optimizer.step()
    optimizer.zero_grad()

    # Two losses of one graph each: the second one is a second micro-batch.
    first, second = model(input_ids=ids, labels=ids).loss, model(input_ids=ids, labels=ids).loss
    first.backward()
    with pytest.raises(nvtier.InvalidArgument, match="one micro-batch"):
        second.backward()
    with pytest.raises(nvtier.InvalidArgument):
        nvtier.train.offload(llama(), torch.optim.AdamW, pool=pool, run="other", step_in="sideways", **ADAMW)

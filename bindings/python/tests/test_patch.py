"""nvtier.patch: safetensors' functions replaced, seen from outside: a Python of its own for every test."""

import json
import os
import pathlib
import sys

import pytest
from common import python, safetensors

pytest.importorskip("torch")
pytest.importorskip("safetensors")


def site_folder():
    """Where the wheel is installed."""
    import nvtier

    return pathlib.Path(nvtier.__file__).parents[1]


def model():
    pytest.importorskip("transformers")
    folder = os.environ.get("NVTIER_MODEL")
    if not folder:
        pytest.skip("no model: NVTIER_MODEL is not set")
    return pathlib.Path(folder) / "snapshot"


GENERATE = """
import json, os, sys, zlib
import torch, transformers
def run(folder):
    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer("The three largest oceans of the world are", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0].tolist()
    sums = {name: zlib.crc32(value.contiguous().view(torch.uint8).numpy()) for name, value in model.state_dict().items()}
    return tokens, sums
"""


def test_transformers_loads_a_real_model_through_it():
    folder = model()
    code = """
import nvtier.patch
import sys
assert not {"torch", "safetensors", "transformers"} & set(sys.modules)
""" + GENERATE + """
ours = run(sys.argv[1])
served = nvtier.patch.calls()
nvtier.patch.undo()
theirs = run(sys.argv[1])
print(json.dumps({"equal": ours == theirs, "tokens": ours[0], "weights": len(ours[1]), "served": served,
                  "after": nvtier.patch.calls()}))
"""
    told = json.loads(python(code, folder).splitlines()[-1])
    shards = len(list(folder.glob("*.safetensors")))
    assert told["equal"] and len(told["tokens"]) > 12
    assert told["served"]["safe_open"] == shards and told["served"]["tensors"] >= 200 and told["served"]["left"] == 0
    assert told["after"] == told["served"]  # undone: the second load was not nvtier's


def test_an_environment_variable_is_enough():
    folder = model()
    pth = site_folder() / "nvtier_patch.pth"
    if not pth.exists():
        pytest.skip("the package was not installed from its wheel: no .pth file")
    # What the interpreter does with a site folder when it starts.
    code = "import site, sys; site.addsitedir(sys.argv[2]);" + GENERATE + """
run(sys.argv[1])
print(json.dumps(sys.modules["nvtier.patch"].calls() if "nvtier.patch" in sys.modules else None))
"""
    told = json.loads(python(code, folder, site_folder(), env={"NVTIER_PATCH": "1"}).splitlines()[-1])
    assert told["tensors"] >= 200
    for value in ("", "0"):
        code = "import site, sys; site.addsitedir(sys.argv[1]); print('nvtier' in sys.modules)"
        assert python(code, site_folder(), env={"NVTIER_PATCH": value}).split() == ["False"]


def test_a_script_run_by_the_module(tmp_path):
    import subprocess

    (tmp_path / "a.safetensors").write_bytes(safetensors({"a": ("U8", [2], b"xy")}))
    (tmp_path / "helper.py").write_text("word = 'found'")
    script = tmp_path / "script.py"
    script.write_text(
        "import helper, safetensors.torch, sys\n"
        "assert __name__ == '__main__' and helper.word == 'found'\n"
        "print(safetensors.torch.load_file(sys.argv[1])['a'].tolist(), sys.argv[2:], sys.modules['nvtier.patch'].calls()['load_file'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "nvtier.patch", script, tmp_path / "a.safetensors", "--x"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[120, 121] ['--x'] 1"
    done = subprocess.run([sys.executable, "-m", "nvtier.patch"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1 and "usage" in done.stderr


@pytest.mark.parametrize("order", ["before", "after"])
def test_names_that_were_imported_before_and_after(tmp_path, order):
    (tmp_path / "a.safetensors").write_bytes(safetensors({"a": ("U8", [2], b"xy"), "b": ("F32", [], b"\0\0\0\0")}))
    (tmp_path / "b.bin").write_bytes((tmp_path / "a.safetensors").read_bytes())
    imports = """
import safetensors, safetensors.torch, types
from safetensors import safe_open
from safetensors.torch import load_file, load_file as other
user = types.ModuleType("user"); user.f = load_file
sys.modules["user"] = user
"""
    code = (
        "import sys\n"
        + (imports + "import nvtier.patch as patch\n" if order == "before" else "import nvtier.patch as patch\n" + imports)
        + """
folder = sys.argv[1]
file = folder + "/a.safetensors"
original = patch._originals["load_file"]
assert load_file is other is user.f is safetensors.torch.load_file is patch.load_file
assert safe_open is safetensors.safe_open is safetensors.torch.safe_open is patch.safe_open
patch.apply()  # again
assert load_file(file)["a"].tolist() == [120, 121] and load_file(file, device="cpu", backend="mmap")["b"].item() == 0
with safe_open(file, framework="pt", device="cpu") as f:
    assert f.keys() == ["a", "b"] and f.get_tensor("a").tolist() == [120, 121] and f.get_slice("a")[1:].tolist() == [121]
    assert set(f.get_tensors()) == {"a", "b"} and f.metadata() is None
assert patch.calls() == {"load_file": 2, "safe_open": 1, "tensors": 4, "left": 0}, patch.calls()
# What is not nvtier's is safetensors' own.
with safe_open(file, framework="np") as f:
    assert type(f.get_tensor("a")).__module__ == "numpy"
assert load_file(folder + "/b.bin")["a"].tolist() == [120, 121]
assert patch.calls()["left"] == 3  # the last one opened its file by the name that is patched
# Errors are those of both.
from safetensors import SafetensorError
import nvtier
with safe_open(file, "pt") as f:
    for call in (f.get_tensor, f.get_slice):
        try: call("c")
        except SafetensorError as error: assert isinstance(error, nvtier.NoTensor) and "c" in str(error)
        else: raise AssertionError
try: f.keys()
except SafetensorError as error: assert isinstance(error, nvtier.Closed)
else: raise AssertionError
for path, kinds in ((folder + "/none.safetensors", (FileNotFoundError, nvtier.NotFound)), (folder + "/bad.safetensors", (SafetensorError, nvtier.Malformed))):
    if "bad" in path: open(path, "wb").write(b"no header here at all")
    for call in (lambda: load_file(path), lambda: safe_open(path, "pt")):
        try: call()
        except kinds[0] as error: assert isinstance(error, kinds[1])
        else: raise AssertionError
patch.undo(); patch.undo()
assert safetensors.torch.load_file is original and user.f is original and load_file is original
assert safetensors.safe_open is patch._originals["safe_open"] is safe_open
before = patch.calls()
assert load_file(file)["a"].tolist() == [120, 121] and patch.calls() == before
patch.apply()
assert safetensors.torch.load_file is patch.load_file and safetensors.torch.load_file(file) and patch.calls()["load_file"] > before["load_file"]
print("fine")
"""
    )
    assert python(code, tmp_path).split()[-1] == "fine"


def test_what_uses_safe_open_goes_on(tmp_path):
    """Code of safetensors and accelerate that opens files themselves."""
    code = """
import sys, nvtier.patch as patch
import torch, safetensors.torch
layer = torch.nn.Linear(3, 2)
file = sys.argv[1] + "/m.safetensors"
safetensors.torch.save_model(layer, file)
other = torch.nn.Linear(3, 2)
safetensors.torch.load_model(other, file)
assert torch.equal(layer.weight, other.weight)
assert patch.calls()["load_file"] == 1
try:
    from accelerate.utils import load_state_dict
except ImportError:
    print("no accelerate")
else:
    state = load_state_dict(file)
    assert torch.equal(state["weight"], layer.weight) and sum(patch.calls().values()) > 1, patch.calls()
print("fine")
"""
    assert python(code, tmp_path).split()[-1] == "fine"

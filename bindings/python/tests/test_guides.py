"""Python blocks of the guides that say that this file runs them: as they stand, but for where the pool and the mount lie."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import nvtier

pytest.importorskip("torch")

GUIDES = pathlib.Path(__file__).resolve().parents[3] / "docs" / "guides"
BLOCK = re.compile(r"^<!-- not run: (?P<why>[^\n]*) -->\n```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LIMIT_S = 240


def blocks():
    found = []
    for page in sorted(GUIDES.glob("*.md")):
        text = page.read_text()
        for match in BLOCK.finditer(text):
            if pathlib.Path(__file__).name in match["why"]:
                line = text.count("\n", 0, match.start("code")) + 1
                found.append(pytest.param(match["code"], match["why"], id=f"{page.name}:{line}"))
    return found


def model():
    folder = os.environ.get("NVTIER_MODEL")
    if not folder:
        pytest.skip("NVTIER_MODEL is not set: run this through `cargo xtask test`")
    return pathlib.Path(folder) / "snapshot"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of the same kind with two narrow layers, and the same tokenizer: steps of the whole one take minutes on a busy processor."""
    transformers = pytest.importorskip("transformers")
    small, folder = model(), tmp_path_factory.mktemp("tiny")
    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.AutoConfig.from_pretrained(small, num_hidden_layers=2, **narrow)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(small).save_pretrained(folder)
    return folder


@pytest.fixture
def reader(tmp_path):
    """What the guides' readers have: a pool with a model in it. Where the model lies is its mount: whether mounts show files is tested elsewhere."""
    small = model()
    (tmp_path / "nvme0").mkdir()
    (tmp_path / "models" / "models").mkdir(parents=True)
    (tmp_path / "models" / "models" / "m").symlink_to(small)
    nvtier.format(tmp_path / "nvme0" / "pool")
    with nvtier.Pool(tmp_path / "nvme0" / "pool") as pool:
        for file in sorted(small.glob("*.safetensors")):
            pool.import_file(file, f"models/m/{file.name}")
    return tmp_path


def execute(code, folder):
    for place in ("/mnt/nvme0", "/mnt/models"):
        code = code.replace(place, str(folder / pathlib.Path(place).name))
    assert "/mnt/" not in code, code
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{code}\nended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("code, why", blocks())
def test_a_block_does_what_its_page_says(code, why, reader, request):
    if "two layers" in why:
        link = reader / "models" / "models" / "m"
        link.unlink()
        link.symlink_to(request.getfixturevalue("tiny"))
    if "transformers" in code:
        pytest.importorskip("transformers")
    printed = execute(code, reader)
    assert printed.strip(), "it prints nothing"
    if "twice" in why:
        first = [line.split()[0] for line in printed.splitlines()]
        second = [line.split()[0] for line in execute(code, reader).splitlines()]
        assert first == [str(number) for number in range(5)], printed
        assert second == [str(number) for number in range(5, 10)], "it does not go on where it ended"
    if "copy.safetensors" in code:
        import safetensors.torch

        ours, theirs = safetensors.torch.load_file(reader / "copy.safetensors"), {}
        for file in model().glob("*.safetensors"):
            theirs.update(safetensors.torch.load_file(file))
        assert ours.keys() == theirs.keys()
        assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    if "space.get" in code:
        assert printed.count("'memory'") + printed.count("'drive'") == 6 and printed.strip().endswith("True"), printed
    if "shard=" in code:
        # Half of the heads' rows and columns, all of the rest.
        whole, part, rows = printed.split(maxsplit=2)
        assert int(whole) > int(part) == 9 and rows.startswith("torch.Size([1000, "), printed
    if "stream.Cache" in code:
        assert "'pool" in printed or "pool" in printed, printed
    if "save_pretrained" in code:
        assert (reader / "fine-tuned" / "config.json").is_file() and list((reader / "fine-tuned").glob("*.safetensors"))
        assert [line.split()[0] for line in printed.splitlines()][-2:] == ["0", "1"], printed
    if "metrics=" in code:
        assert "nvtier_pool_regions " in printed and "nvtier_kv_" in printed, printed
    if "PrefixCache" in code:
        # Of the second prompt, the head that it has in common with the first.
        loaded = [int(number) for number in re.findall(r"'loaded_tokens': (\d+)", printed)]
        assert len(loaded) == 2 and loaded[0] == 0 < loaded[1], printed


def test_the_guides_that_have_whole_programs_are_among_them():
    pages = [parameter.id.split(":")[0] for parameter in blocks()]
    assert pages.count("quickstart.md") >= 3 and pages.count("streaming.md") == 2, pages
    assert {"kv.md", "metrics.md", "python.md", "training.md"} <= set(pages), pages

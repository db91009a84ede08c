"""`nvtier import` and `export` beside a running mount, from folders and from an S3 server on loopback."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from conftest import run
from test_everyday import tree


def contents(root):
    """Path -> digest of every file; modes and times are not part of an object store."""
    return {path: entry[-1] for path, entry in tree(root).items() if len(entry) == 4}


def test_import_of_a_snapshot_beside_the_mount(nvtier, place, model):
    if os.environ.get("NVTIER_PLAIN"):
        pytest.skip("needs a pool")
    run(nvtier, "import", model / "snapshot", "imported/snapshot", "--pool", place.pool)
    assert contents(place.root / "imported/snapshot") == contents(model / "snapshot")
    run(nvtier, "verify", "imported", "--pool", place.pool)


def test_import_and_export_of_a_file(nvtier, place, model, native):
    if os.environ.get("NVTIER_PLAIN"):
        pytest.skip("needs a pool")
    run(nvtier, "import", model / "model.gguf", "one.gguf", "--pool", place.pool)
    run("cmp", model / "model.gguf", place.root / "one.gguf")
    run(nvtier, "export", "one.gguf", native / "back.gguf", "--pool", place.pool)
    run("cmp", model / "model.gguf", native / "back.gguf")
    run(nvtier, "rm", "one.gguf", "--pool", place.pool)
    assert not (place.root / "one.gguf").exists()


@contextlib.contextmanager
def s3_server(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(folder / "moto.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "moto.log").read_text()
                assert time.monotonic() < deadline, "the S3 server did not come up"
                time.sleep(0.05)
        yield url
    finally:
        server.kill()
        server.wait()


def test_import_from_s3(nvtier, place, model, native):
    if os.environ.get("NVTIER_PLAIN"):
        pytest.skip("needs a pool")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto")
    with s3_server(native) as url:
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=url, **keys)
        client.create_bucket(Bucket="models")
        for path in (model / "snapshot").iterdir():
            client.upload_file(str(path), "models", f"smollm2/{path.name}")
        environment = {
            **os.environ,
            "AWS_ENDPOINT": url,
            "AWS_ENDPOINT_URL": url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
        run(nvtier, "import", "--recursive", "s3://models/smollm2/", "from-s3", "--pool", place.pool, env=environment)
        assert contents(place.root / "from-s3") == contents(model / "snapshot")
        one = "s3://models/smollm2/model-00003-of-00003.safetensors"
        run(nvtier, "import", one, "third.safetensors", "--pool", place.pool, env=environment)
        run("cmp", model / "snapshot/model-00003-of-00003.safetensors", place.root / "third.safetensors")
        missing = subprocess.run(
            [nvtier, "import", "s3://models/nothing", "nothing", "--pool", str(place.pool)],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=120,
        )  # fmt: skip
        assert missing.returncode == 3, missing
        assert not (place.root / "nothing").exists()

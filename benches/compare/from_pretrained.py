#!/usr/bin/env python3
"""Time of transformers' from_pretrained from a mount against the same snapshot on the native file system, cold.

Usage: from_pretrained.py NATIVE_SNAPSHOT MOUNTED_SNAPSHOT [ROUNDS=7]     (as root: caches are dropped before every load)

Alternates A B A B in one process, after one unmeasured load of each. Each load ends with one sum over every parameter, so that mapped pages
are really read. Prints medians with (min..max) and the ratio; the sums of both sides must be equal.
"""
import os
import statistics
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()


def load(path):
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as caches:
        caches.write("3")
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    total = sum(float(parameter.detach().sum(dtype=torch.float64)) for parameter in model.parameters())
    return time.perf_counter() - start, total


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    sides = {"native": sys.argv[1], "mount": sys.argv[2]}
    rounds = int(sys.argv[3]) if len(sys.argv) == 4 else 7
    sums = {side: load(path)[1] for side, path in sides.items()}
    if len(set(sums.values())) != 1:
        sys.exit(f"the two sides loaded different parameters: {sums}")
    seconds = {side: [] for side in sides}
    for _ in range(rounds):
        for side, path in sides.items():
            seconds[side].append(load(path)[0])
    for side, all_seconds in seconds.items():
        print(f"{side}: {statistics.median(all_seconds):.3f} s ({min(all_seconds):.3f}..{max(all_seconds):.3f}), {rounds} rounds")
    print(f"mount / native: {statistics.median(seconds['mount']) / statistics.median(seconds['native']):.3f}")


main()

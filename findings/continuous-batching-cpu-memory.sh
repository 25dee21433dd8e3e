#!/bin/bash
# transformers: continuous batching (`generate_batch`, and TRL's use_transformers_continuous_batching) makes its cache as
# large as memory allows. On a GPU it asks the driver what is free. On a CPU it takes the machine's memory minus that of
# its own process, and does not look at other processes. We guessed that it asks the system for the available memory,
# as on a GPU. So two trainers on one machine, or a trainer beside its sandbox or data loaders, each plan with memory
# that the others hold, and the system ends one of them long after the start. Give `num_blocks` on a shared machine.
# The script lets a second process hold 1 GB, and prints what both sources call free before and after.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.20.2 psutil==7.1.3
cat > "$folder/look.py" <<'PYTHON'
import os
import subprocess
import sys

import psutil
import transformers

os.environ["CUDA_VISIBLE_DEVICES"] = ""
from transformers.generation.continuous_batching.requests import get_device_and_memory_breakdown

GB = 1e9


def free():
    """GB that transformers plans with, and GB that the system can give."""
    device, total, reserved, allocated = get_device_and_memory_breakdown()
    assert device.type == "cpu", device
    return (total - max(reserved, allocated)) / GB, psutil.virtual_memory().available / GB


print("transformers", transformers.__version__)
before = free()
holder = subprocess.Popen([sys.executable, "-c", "held = b'x' * 10 ** 9; print(len(held), flush=True); input()"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)
holder.stdout.readline()
after = free()
holder.communicate(b"\n")
print("GB                            before   after")
print(f"free, says transformers      {before[0]:7.1f} {after[0]:7.1f}")
print(f"available, says the system   {before[1]:7.1f} {after[1]:7.1f}")
unaware = before[0] - after[0] < 0.3 and before[1] - after[1] > 0.6
print("another process's gigabyte is", "not seen" if unaware else "seen")
sys.exit(0 if unaware else 1)
PYTHON
"$folder/venv/bin/python" "$folder/look.py"

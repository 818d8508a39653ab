"""Generate with an artifact in optimum's ORTModelForCausalLM: alone and in a batch, the same text.

    python -m venv optimum && . optimum/bin/activate
    pip install 'transformers<5' optimum==2.0.0 optimum-onnx==0.1.0 onnxruntime torch
    python tools/optimum_generation.py DIR "import " "def f(x):"

In an environment of its own: optimum-onnx 0.1.0 does not import beside Transformers 5, which
qcompile needs.
"""

from __future__ import annotations

import sys

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def main() -> None:
    folder, *prompts = sys.argv[1:]
    model = ORTModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def texts(batch: list[str]) -> list[str]:
        inputs = tokenizer(batch, return_tensors="pt", padding=True)
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        found = model.generate(**tokens, max_new_tokens=64, do_sample=False)
        return tokenizer.batch_decode(found, skip_special_tokens=True)

    together = texts(prompts)
    for prompt, text in zip(prompts, together, strict=True):
        print(repr(text))
        if texts([prompt]) != [text]:
            sys.exit("another text when it is generated alone")


if __name__ == "__main__":
    main()

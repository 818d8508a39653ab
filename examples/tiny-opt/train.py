"""Train the tiny byte-level OPT model of this folder on the sources of Python's standard library.

Everything the model needs comes with Python itself: the text is the ``.py`` files of the running
interpreter's standard library (no site-packages, no tests).  One file in sixteen is held out; short
snippets of those files become ``calibration.txt`` and ``evaluation.txt``, and nothing is trained on
them.  Training takes minutes on two CPU cores:

    python train.py --output .
"""

import argparse
import json
import math
import random
import sys
import sysconfig
import time
import zlib
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

PAD, BOS, FIRST_BYTE = 0, 1, 2  # byte b has the id FIRST_BYTE + b; BOS also ends a document
PAD_TOKEN, BOS_TOKEN = "<|pad|>", "<|endoftext|>"
POSITIONS = 512
SHORT_WINDOW, SHORT_BATCH, LONG_BATCH = 256, 8, 4
LONG_SHARE = 0.25  # the last part of training sees windows of the full length
HELD_OUT_ONE_IN = 16
# Tables, demos and tests are left out.
SKIPPED = {"encodings", "pydoc_data", "turtledemo", "test", "tests", "idle_test"}
DOCUMENTS = 120  # in calibration.txt and in evaluation.txt, each of at most 510 bytes
MUON_RATE, ADAM_RATE, WARMUP_STEPS = 0.03, 0.01, 100


def library_files() -> list[tuple[str, str]]:
    """Return (relative path, text) of the standard library's sources, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or SKIPPED.intersection(parts):
            continue
        found.append(("/".join(parts), path.read_text(encoding="utf-8", errors="replace")))
    return found


def split(files: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Divide the files by a checksum of their names into training and held-out texts."""
    parts: tuple[list[str], list[str]] = ([], [])
    for name, text in files:
        parts[zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0].append(text)
    return parts


def snippets(text: str) -> list[str]:
    """Cut a text at line ends into pieces that fit one window of the model."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        if len((piece + line).encode()) > POSITIONS - 2:
            pieces.append(piece)
            piece = ""
        piece += line
    pieces.append(piece)
    return [p.strip("\n") for p in pieces if POSITIONS // 2 < len(p.encode()) <= POSITIONS - 2]


def write_texts(held_out: list[str], folder: Path) -> dict[str, list[str]]:
    """Write calibration.txt and evaluation.txt, each from held-out files of its own."""
    # Files with a copyright notice of their own stay out: what is written falls under Python's.
    usable = [text for text in held_out if "copyright" not in text.lower()]
    documents = {}
    for index, name in enumerate(("calibration", "evaluation")):
        pool = [piece for text in usable[index::2] for piece in snippets(text)]
        random.Random(index).shuffle(pool)
        documents[name] = list(dict.fromkeys(pool))[:DOCUMENTS]
        joined = f"\n{BOS_TOKEN}\n".join(documents[name]) + "\n"
        (folder / f"{name}.txt").write_bytes(joined.encode())
    return documents


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer: two special tokens, then the 256 bytes; BOS is put in front."""
    # The ByteLevel alphabet writes printable bytes as themselves and the others from U+0100 on.
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    symbols = [chr(b) if b in plain else chr(256 + others.index(b)) for b in range(256)]
    vocabulary = {symbol: number for number, symbol in enumerate([PAD_TOKEN, BOS_TOKEN, *symbols])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, BOS)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (PAD_TOKEN, BOS_TOKEN)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD_TOKEN,
        "bos_token": BOS_TOKEN,
        "eos_token": BOS_TOKEN,
        "model_max_length": POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(text: str) -> Tensor:
    """Return the ids of a text as the tokenizer does: BOS, then the bytes."""
    return torch.tensor([BOS, *(FIRST_BYTE + byte for byte in text.encode())])


def held_out_loss(model: OPTForCausalLM, documents: list[str]) -> float:
    """Return the mean negative log-likelihood in nats per byte, each document after a BOS."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for document in documents:
            ids = encode(document)
            logits = model(input_ids=ids[None, :-1]).logits[0].float()
            total += nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
            count += len(ids) - 1
    return total / count


def train(model: OPTForCausalLM, stream: Tensor, steps: int, validation: list[str]) -> None:
    """Train on random windows: Muon for the matrices of the layers, AdamW for all the rest."""
    inner = [p for p in model.model.decoder.layers.parameters() if p.ndim == 2]
    outer = [p for p in model.parameters() if all(p is not other for other in inner)]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.Muon(inner, weight_decay=0.01), MUON_RATE),
        (torch.optim.AdamW(outer, betas=(0.9, 0.98), weight_decay=0.0), ADAM_RATE),
    ]
    started = time.monotonic()
    for step in range(steps):
        long = step >= steps * (1 - LONG_SHARE)
        window, batch = (POSITIONS, LONG_BATCH) if long else (SHORT_WINDOW, SHORT_BATCH)
        starts = torch.randint(len(stream) - window, (batch, 1))
        labels = stream[starts + torch.arange(window)]
        inputs = torch.cat([torch.full((batch, 1), BOS), labels[:, :-1]], dim=1)
        # Short windows lie anywhere in the range of positions, so that all of them are learnt.
        positions = torch.arange(window) + torch.randint(POSITIONS - window + 1, (batch, 1))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        torch.autograd.backward([loss])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            held_out, seconds = held_out_loss(model, validation), time.monotonic() - started
            losses = f"training {loss.item():.3f}, calibration texts {held_out:.4f} nats per byte"
            print(f"step {step + 1}: {losses}, {seconds:.0f} s", flush=True)


def main() -> None:
    """Write the texts, train, save the model in float16 and measure what was saved."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=4500, help="optimizer steps (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument("--texts-only", action="store_true", help="write texts and tokenizer only")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    training, held_out = split(library_files())
    documents = write_texts(held_out, output)
    write_tokenizer(output)
    if arguments.texts_only:
        return
    torch.manual_seed(arguments.seed)
    config = OPTConfig(
        vocab_size=FIRST_BYTE + 256,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_dim=512,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        init_std=0.05,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=BOS,
    )
    model = OPTForCausalLM(config)
    stream = torch.cat([encode(text) for text in training])
    print(f"{len(training)} files ({len(stream)} tokens), {len(held_out)} held out", flush=True)
    train(model, stream, arguments.steps, documents["calibration"])

    nn.Module.half(model).save_pretrained(output)
    saved = OPTForCausalLM.from_pretrained(output, dtype=torch.float32)
    print(f"evaluation texts: {held_out_loss(saved, documents['evaluation']):.4f} nats per byte")


if __name__ == "__main__":
    main()

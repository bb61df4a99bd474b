"""Look inside a forward pass: which experts and which compressed rows does each token use?

    python docs/observe.py MODEL_DIRECTORY "some text"

`forward` hands every named intermediate to `observe(name, tensor)`: `layers.N.attn.q`, `.listed` (rows the
indexer chose), `.compressed`, `layers.N.ffn.ids`, `.weights`, `layers.N.ffn.streams`, `logits`, …
"""

import sys
from collections import Counter

import torch

from fourfold.core.config import EngineConfig
from fourfold.core.device import detect
from fourfold.engine.loading import load_model
from fourfold.engine.oneshot import one_shot
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.locate import locate

location = locate(sys.argv[1])
model = load_model(location, EngineConfig(model=sys.argv[1]), detect("cpu")).model
tokens = Tokenizer.from_directory(location.directory).encode(sys.argv[2])


def observe(name: str, value: torch.Tensor) -> None:
    """Print what a few of the intermediates say."""
    if name.endswith(".ffn.ids"):
        busiest = Counter(value.flatten().tolist()).most_common(3)
        print(f"{name:<24} busiest experts (id, tokens): {busiest}")
    elif name.endswith(".listed"):
        print(f"{name:<24} rows the last token reads: {[r for r in value[-1].tolist() if r >= 0]}")
    elif name.endswith(".streams"):
        sizes = value.float().square().mean((0, 2)).sqrt()
        print(f"{name:<24} RMS of each stream: {[round(s, 2) for s in sizes.tolist()]}")


with torch.inference_mode():
    one_shot(model, [tokens], observe=observe)

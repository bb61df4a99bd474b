"""The model against `transformers`' own DeepSeek-V4, loaded from the same directory.

The checkpoint is written in native names; `transformers` maps them itself, so its mapping is the judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.engine.oneshot import one_shot
from fourfold.model.v4 import DeepseekV4
from fourfold.ops.indexer import index_scores
from tests.support import load_small, prompts, write_small

transformers = pytest.importorskip("transformers", minversion="5.23")

TOLERANCE = 1e-4  # largest logit difference allowed, at logits of a few units
TIE = 1e-4  # a top-k decided by less than this may fall differently in float32

GEOMETRIES: dict[str, dict[str, Any]] = {
    "all kinds": {},
    "window only": {"compress_ratios": [0, 0, 0], "num_hidden_layers": 2},
    "visible eps": {"hc_eps": 1e-2, "rms_norm_eps": 1e-2, "num_hash_layers": 1},
    "full lists": {
        "index_topk": 244,
        "index_n_heads": 32,
        "compress_ratios": [4, 128, 0],
        "num_hidden_layers": 2,
        "hc_eps": 1e-3,
    },
    "short lists": {
        "index_topk": 24,
        "index_n_heads": 32,
        "compress_ratios": [4, 0, 0],
        "num_hidden_layers": 2,
        "num_hash_layers": 2,
    },
    "like Pro": {
        "compress_ratios": [128, 128, 4, 128, 0],
        "num_attention_heads": 8,
        "o_groups": 4,
        "routed_scaling_factor": 2.5,
        "num_hash_layers": 3,
        "swiglu_limit": 0.5,
    },
    "odd sizes": {
        "vocab_size": 101,
        "hidden_size": 50,
        "num_attention_heads": 6,
        "head_dim": 22,
        "qk_rope_head_dim": 6,
        "q_lora_rank": 27,
        "o_groups": 3,
        "o_lora_rank": 11,
        "moe_intermediate_size": 37,
        "n_routed_experts": 7,
        "num_experts_per_tok": 2,
        "index_head_dim": 18,
        "sliding_window": 33,
        "hc_eps": 1e-2,
        "rms_norm_eps": 1e-2,
    },
    "all learned, two streams": {
        "num_hash_layers": 0,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
        "compress_ratios": [0, 128, 4, 0],
        "num_hidden_layers": 3,
        "num_experts_per_tok": 1,
    },
}

LENGTHS = {
    "short lists": 150
}  # many positions choose few of their rows; ties would be common in more
SHORT = (*range(1, 10), 127, 128, 129, 130, 255, 256, 257, 258)


@dataclass
class NearTies:
    """Watches a float64 run for top-k choices that float32 might make differently."""

    model: DeepseekV4
    closest: float = float("inf")

    def __post_init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor) -> None:
        layer, _, what = name.rpartition(".")
        self.seen[name] = value
        if what == "logits" and layer.endswith(".ffn"):
            ffn = self.model.layers[int(layer.split(".")[1])].ffn
            if ffn.bias is not None:
                score = torch.nn.functional.softplus(value).sqrt() + ffn.bias
                self._note(score, self.model.config.num_experts_per_tok)
        elif what == "listed":
            keys, q = self.seen[f"{layer}.index_keys"], self.seen[f"{layer}.index_q"]
            score = index_scores(q, self.seen[f"{layer}.index_weights"], keys)
            position = torch.arange(score.shape[0]).unsqueeze(-1)
            hidden = torch.arange(score.shape[1]) >= (position + 1) // 4
            self._note(score.masked_fill(hidden, float("-inf")), self.model.config.index_topk)

    def _note(self, score: Tensor, k: int) -> None:
        if score.shape[-1] > k:
            top = score.topk(k + 1).values
            gap = (top[:, k - 1] - top[:, k]).nan_to_num(float("inf"))
            self.closest = min(self.closest, float(gap.min()))


def without_ties(directory: Path, config: dict[str, Any], length: int) -> tuple[Path, list[int]]:
    """A checkpoint and `length` tokens whose every top-k is decided by more than `TIE`."""
    for seed in range(60):
        folder = write_small(directory / str(seed), "float32", seed=seed, **config)
        model = load_small(folder, torch.float64)
        tokens = prompts(model.config.vocab_size, [length], seed)[0]
        ties = NearTies(model)
        one_shot(model, [tokens], observe=ties)
        if ties.closest > TIE:
            return folder, tokens
    raise AssertionError("no seed without a near-tie")


def reference(directory: Path) -> Any:
    oracle, info = transformers.DeepseekV4ForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        experts_implementation="eager",  # the grouped one wants sizes in multiples of 16 bytes
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return oracle.eval()


@pytest.mark.full
@pytest.mark.parametrize("name", GEOMETRIES)
@torch.inference_mode()
def test_logits_equal_transformers_at_every_position(name: str, tmp_path: Path) -> None:
    directory, tokens = without_ties(tmp_path, GEOMETRIES[name], LENGTHS.get(name, 1030))
    ours, oracle = load_small(directory, torch.float32), reference(directory)
    assert ours.config.num_hidden_layers == oracle.config.num_hidden_layers
    sequences = [tokens, *[tokens[:n] for n in SHORT if n < len(tokens)]]
    got = one_shot(ours, sequences).logits.split([len(s) for s in sequences])
    for sequence, logits in zip(sequences, got, strict=True):
        expected = oracle(torch.tensor([sequence]), use_cache=False).logits[0]
        worst = (logits - expected).abs().amax(-1)
        where = int(worst.argmax())
        assert float(worst[where]) < TOLERANCE, f"length {len(sequence)}, position {where}"
    assert float(expected.abs().max()) > 0.5  # the comparison is about something


@pytest.mark.full
@torch.inference_mode()
def test_mtp_layer_equals_a_transformers_layer(tmp_path: Path) -> None:
    """`transformers` ignores `mtp.*`; its window layer with our MTP weights is an oracle all the same."""
    changes = {"compress_ratios": [0, 0], "num_hidden_layers": 1, "num_hash_layers": 0}
    directory = write_small(tmp_path / "c", "float32", seed=5, hc_eps=1e-2, **changes)
    model, oracle = load_small(directory, torch.float32), reference(directory)
    mtp, block = model.mtp[0], oracle.model.layers[0]
    from safetensors.torch import load_file

    stored: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        stored |= load_file(file)
    # Put the MTP block's weights where layer 0's were, in a copy that transformers loads again.
    moved = {k: v for k, v in stored.items() if not k.startswith(("layers.0.", "mtp.0."))}
    outside = (
        "e_proj",
        "h_proj",
        "enorm",
        "hnorm",
        "norm",
        "hc_head_fn",
        "hc_head_base",
        "hc_head_scale",
    )
    for key, value in stored.items():
        if key.startswith("mtp.0."):
            rest = key.removeprefix("mtp.0.")
            if rest.split(".")[0] in outside:
                if rest.startswith(("norm", "hc_head")):
                    moved[rest] = value
            else:
                moved["layers.0." + rest] = value
    from safetensors.torch import save_file

    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "config.json").write_text((directory / "config.json").read_text())
    save_file(moved, twin / "model.safetensors")
    del block
    layer_oracle = reference(twin)
    tokens = prompts(model.config.vocab_size, [200], 3)[0]

    # Feed transformers' decoder the MTP input by replacing its embedding-and-copy step.
    captured: dict[str, Tensor] = {}

    def replace_input(module: Any, args: Any, kwargs: Any) -> Any:
        streams = captured["input"].unsqueeze(0)
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": streams}
        return (streams, *args[1:]), kwargs

    from fourfold.engine.oneshot import one_shot_with_mtp, pack

    batch, state = pack(model, [tokens])
    streams = model.forward(batch, state).streams
    following = torch.tensor([*tokens[1:], 0])

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps) * weight
        )

    embedded = norm(stored["embed.weight"][following], stored["mtp.0.enorm.weight"])
    hidden = norm(streams, stored["mtp.0.hnorm.weight"])
    captured["input"] = (embedded @ stored["mtp.0.e_proj.weight"].T).unsqueeze(1) + hidden @ stored[
        "mtp.0.h_proj.weight"
    ].T
    layer_oracle.model.layers[0].register_forward_pre_hook(replace_input, with_kwargs=True)
    expected = layer_oracle(torch.tensor([tokens]), use_cache=False).logits[0]
    _, got = one_shot_with_mtp(model, [tokens])
    assert float((got - expected).abs().max()) < TOLERANCE
    assert mtp.block.attn.ratio == 0

"""Ways in which checkpoints break: each does one thing to a copy and says what must be named.

A corruption gets a `Copy` and a source of random numbers, and returns the text that a finding must have
in its tensor, file or message. `edit` changes a header and keeps the data; `rebuild` writes a header
anew, with holes for data, so that the file itself stays sound.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fourfold.weights.header import DTYPE_BITS

INDEX = "model.safetensors.index.json"
Entry = dict[str, Any]


class Copy:
    """A checkpoint whose files are links to another's until they are written."""

    def __init__(self, source: Path, folder: Path):
        self.folder = folder
        folder.mkdir()
        for path in source.iterdir():
            os.link(path, folder / path.name)

    def shards(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.safetensors"))

    def write(self, name: str, data: bytes) -> None:
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).write_bytes(data)

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def write_json(self, name: str, data: Any) -> None:
        self.write(name, json.dumps(data).encode())

    def header(self, name: str) -> dict[str, Entry]:
        raw = (self.folder / name).read_bytes()
        return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])

    def edit(self, name: str, change: Callable[[dict[str, Entry]], Any], pad: bytes = b"") -> None:
        """Another header before the same data."""
        raw = (self.folder / name).read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:begin])
        header = change(header) or header
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        self.write(name, len(text).to_bytes(8, "little") + text + raw[begin:] + pad)

    def rebuild(self, name: str, change: Callable[[dict[str, Entry]], Any]) -> None:
        """Another header, with offsets that fit it, before holes."""
        header = self.header(name)
        change(header)
        position = 0
        for entry in header.values():
            size = math.prod(entry["shape"]) * DTYPE_BITS[entry["dtype"]] // 8
            entry["data_offsets"] = [position, position + size]
            position += size
        text = json.dumps(header).encode()
        self.write(name, len(text).to_bytes(8, "little") + text)
        os.truncate(self.folder / name, 8 + len(text) + position)
        self.reindex()

    def reindex(self) -> None:
        """An index that fits the files."""
        files = {tensor: name for name in self.shards() for tensor in self.header(name)}
        self.write_json(INDEX, {"metadata": {}, "weight_map": files})

    def index(self, change: Callable[[dict[str, Any]], Any]) -> None:
        data = self.json(INDEX)
        change(data)
        self.write_json(INDEX, data)

    def config(self, **changes: Any) -> str:
        self.write_json("config.json", {**self.json("config.json"), **changes})
        return next(iter(changes))

    def poke(self, tensor: str, offset: int, data: bytes) -> str:
        """Overwrite data of a tensor from its byte `offset`."""
        name = self.json(INDEX)["weight_map"][tensor]
        raw = bytearray((self.folder / name).read_bytes())
        begin = 8 + int.from_bytes(raw[:8], "little") + self.header(name)[tensor]["data_offsets"][0]
        raw[begin + offset : begin + offset + len(data)] = data
        self.write(name, bytes(raw))
        return tensor

    def read(self, tensor: str) -> bytes:
        name = self.json(INDEX)["weight_map"][tensor]
        raw = (self.folder / name).read_bytes()
        base = 8 + int.from_bytes(raw[:8], "little")
        begin, end = self.header(name)[tensor]["data_offsets"]
        return raw[base + begin : base + end]


Corruption = Callable[[Copy, random.Random], str]


def pick(copy: Copy, rng: random.Random, ending: str, layers: bool = True) -> tuple[str, str]:
    """(file, tensor) of a random tensor whose name ends so."""
    weight_map = copy.json(INDEX)["weight_map"]
    names = sorted(t for t in weight_map if t.endswith(ending) and (t[:3] == "lay" or not layers))
    tensor = rng.choice(names)
    return weight_map[tensor], tensor


def changed(ending: str, rebuilt: bool = False, **entry: Any) -> Corruption:
    """A random tensor's header entry with other values; functions are given the old ones."""

    def corrupt(copy: Copy, rng: random.Random) -> str:
        file, tensor = pick(copy, rng, ending)

        def change(header: dict[str, Entry]) -> None:
            own = header[tensor]
            own.update({k: v(own[k]) if callable(v) else v for k, v in entry.items()})

        (copy.rebuild if rebuilt else copy.edit)(file, change)
        return tensor

    return corrupt


def removed(*endings: str) -> Corruption:
    """A random tensor, or its family, taken out of file and index."""

    def corrupt(copy: Copy, rng: random.Random) -> str:
        file, tensor = pick(copy, rng, endings[0])
        stem = tensor.removesuffix(endings[0])
        copy.rebuild(file, lambda header: [header.pop(stem + end) for end in endings] and None)
        return tensor.replace(".scale", ".weight")

    return corrupt


def added(name: str, dtype: str, shape: list[int]) -> Corruption:
    """A tensor nobody asked for."""

    def corrupt(copy: Copy, rng: random.Random) -> str:
        layer = rng.randrange(6)
        file = copy.json(INDEX)["weight_map"][f"layers.{layer}.attn_norm.weight"]
        tensor = f"layers.{layer}.{name}"
        copy.rebuild(file, lambda header: header.update({tensor: {"dtype": dtype, "shape": shape}}))
        return tensor.removesuffix("_scale_2")

    return corrupt


def renamed(copy: Copy, rng: random.Random) -> str:
    file, tensor = pick(copy, rng, ".weight")
    copy.edit(file, lambda header: {k.replace(tensor, tensor + "s"): v for k, v in header.items()})
    return tensor + "s"


def a_namesake_of_another_layer(copy: Copy, rng: random.Random) -> str:
    file, tensor = pick(copy, rng, "attn.q_norm.weight")
    layer = int(tensor.split(".")[1])
    other = tensor.replace(f"layers.{layer}.", f"layers.{(layer + 1) % 6}.")
    copy.edit(file, lambda h: {other if k == tensor else k: v for k, v in h.items()})
    return other


def stored_twice(copy: Copy, rng: random.Random) -> str:
    """In a later file too, of which the index says nothing."""
    file, tensor = pick(copy, rng, "attn.q_norm.weight")
    entry, before = copy.header(file)[tensor], copy.json(INDEX)
    later = rng.choice([name for name in copy.shards() if name > file])
    copy.rebuild(later, lambda header: header.update({tensor: dict(entry)}))
    copy.index(lambda index: index.update(weight_map=before["weight_map"]))
    return tensor


def truncated(copy: Copy, rng: random.Random) -> str:
    name = rng.choice(copy.shards())
    data = (copy.folder / name).read_bytes()
    copy.write(name, data[: len(data) - rng.randrange(1, 500)])
    return name


def truncated_in_its_header(copy: Copy, rng: random.Random) -> str:
    name = rng.choice(copy.shards())
    copy.write(name, (copy.folder / name).read_bytes()[: rng.randrange(0, 60)])
    return name


def deleted(copy: Copy, rng: random.Random) -> str:
    name = rng.choice(copy.shards())
    (copy.folder / name).unlink()
    return name


def deleted_without_an_index(copy: Copy, rng: random.Random) -> str:
    (copy.folder / INDEX).unlink()
    return deleted(copy, rng)


def swapped(copy: Copy, rng: random.Random) -> str:
    first, second = rng.sample(copy.shards()[1:7], 2)
    one, two = ((copy.folder / name).read_bytes() for name in (first, second))
    copy.write(first, two)
    copy.write(second, one)
    return min(first, second)


def replaced_by_its_neighbour(copy: Copy, rng: random.Random) -> str:
    first, second = rng.sample(copy.shards()[1:7], 2)
    copy.write(first, (copy.folder / second).read_bytes())
    return first


def misnamed(copy: Copy, rng: random.Random) -> str:
    name = rng.choice(copy.shards())
    (copy.folder / name).rename(copy.folder / "copy.safetensors")
    return "copy.safetensors"


def trailing_bytes(copy: Copy, rng: random.Random) -> str:
    name = rng.choice(copy.shards())
    copy.edit(name, lambda header: None, pad=b"x" * rng.randrange(1, 50))
    return name


def garbage_header(copy: Copy, rng: random.Random) -> str:
    name = rng.choice(copy.shards())
    copy.edit(name, lambda header: b'{"a": \xff' + rng.randbytes(50))
    return name


def endless_header(copy: Copy, rng: random.Random) -> str:
    name = rng.choice(copy.shards())
    copy.write(name, (2**60).to_bytes(8, "little") + (copy.folder / name).read_bytes()[8:])
    return name


def named_twice(copy: Copy, rng: random.Random) -> str:
    file, tensor = pick(copy, rng, "attn_norm.weight")

    def twice(header: dict[str, Entry]) -> bytes:
        text = json.dumps(header)
        return (text[:-1] + f', "{tensor}": {json.dumps(header[tensor])}}}').encode()

    copy.edit(file, twice)
    return file


def overlapping(copy: Copy, rng: random.Random) -> str:
    file, tensor = pick(copy, rng, "ffn_norm.weight")

    def shift(header: dict[str, Entry]) -> None:
        begin, end = header[tensor]["data_offsets"]
        header[tensor]["data_offsets"] = [begin - 64, end - 64]

    copy.edit(file, shift)
    return tensor


def stale_entry(copy: Copy, rng: random.Random) -> str:
    file, tensor = pick(copy, rng, "w1.weight")
    gone = tensor.replace("w1", "w9")
    copy.index(lambda index: index["weight_map"].update({gone: file}))
    return gone


def lying_entry(copy: Copy, rng: random.Random) -> str:
    file, tensor = pick(copy, rng, ".weight")
    other = rng.choice([name for name in copy.shards() if name != file])
    copy.index(lambda index: index["weight_map"].update({tensor: other}))
    return tensor


def unlisted(copy: Copy, rng: random.Random) -> str:
    _, tensor = pick(copy, rng, ".weight")
    copy.index(lambda index: index["weight_map"].pop(tensor))
    return tensor


def escaping_entry(copy: Copy, rng: random.Random) -> str:
    _, tensor = pick(copy, rng, ".weight")
    copy.index(lambda index: index["weight_map"].update({tensor: "../other.safetensors"}))
    return tensor


def wrong_total(copy: Copy, rng: random.Random) -> str:
    copy.index(lambda index: index["metadata"].update(total_size=rng.randrange(10**6)))
    return INDEX


def broken_index(copy: Copy, rng: random.Random) -> str:
    data = (copy.folder / INDEX).read_bytes()
    copy.write(INDEX, data[: rng.randrange(100, len(data))])
    return INDEX


def extra_file(copy: Copy, rng: random.Random) -> str:
    shutil.copy(copy.folder / copy.shards()[0], copy.folder / "old.safetensors")
    return "old.safetensors"


def expert_beyond(copy: Copy, rng: random.Random) -> str:
    file, tensor = pick(copy, rng, "experts.7.w1.weight")
    beyond = tensor.replace("experts.7", "experts.8")
    copy.rebuild(file, lambda header: header.update({beyond: dict(header[tensor])}))
    return beyond


def a_layer_too_few(copy: Copy, rng: random.Random) -> str:
    name = copy.json(INDEX)["weight_map"]["layers.5.attn_norm.weight"]
    (copy.folder / name).unlink()
    for number, shard in enumerate(copy.shards(), 1):
        (copy.folder / shard).rename(copy.folder / f"part-{number}.safetensors")
    copy.reindex()
    return "num_hidden_layers"


def set_config(**changes: Any) -> Corruption:
    return lambda copy, rng: copy.config(**changes)


def broken_config(copy: Copy, rng: random.Random) -> str:
    copy.write("config.json", (copy.folder / "config.json").read_bytes()[: rng.randrange(10, 400)])
    return "config.json"


def quantisation(**changes: Any) -> Corruption:
    def corrupt(copy: Copy, rng: random.Random) -> str:
        own = copy.json("config.json")["quantization_config"]
        copy.config(quantization_config={**own, **changes})
        return next(iter(changes))

    return corrupt


HEADERS: dict[str, tuple[str, Corruption, int]] = {
    "renamed": ("native", renamed, 2),
    "a namesake of another layer": ("fp8", a_namesake_of_another_layer, 2),
    "stored twice": ("bf16", stored_twice, 2),
    "reshaped": ("native", changed("attn.wq_b.weight", shape=lambda s: s[::-1]), 2),
    "reshaped expert": ("native", changed("w1.weight", shape=lambda s: [s[0] // 2, s[1] * 2]), 2),
    "reshaped vector": ("bf16", changed("kv_norm.weight", shape=lambda s: [2, s[0] // 2]), 2),
    "another float dtype": ("bf16", changed("ffn_norm.weight", dtype="F16"), 1),
    "another FP8": ("fp8", changed("attn.wkv.weight", dtype="F8_E5M2"), 2),
    "bytes instead of FP8": ("native", changed("attn.wo_b.weight", dtype="I8"), 2),
    "one expert unsigned": ("native", changed("w3.weight", dtype="U8"), 2),
    "routes as floats": ("native", changed("tid2eid", dtype="F64"), 2),
    "unknown dtype": ("bf16", changed("attn_norm.weight", dtype="BF17"), 2),
    "size that does not fit": ("fp8", changed("attn_norm.weight", shape=lambda s: [s[0] + 1]), 2),
    "FP8 scale missing": ("native", removed("attn.wq_a.scale"), 2),
    "expert scale missing": ("native", removed("w2.scale"), 2),
    "expert missing": ("fp8", removed("experts.3.w2.weight", "experts.3.w2.scale"), 2),
    "norm missing": ("bf16", removed("attn.q_norm.weight"), 2),
    "weight missing, scale left": ("native", removed("attn.wkv.weight"), 2),
    "scale of another shape": (
        "native",
        changed("attn.wo_a.scale", rebuilt=True, shape=lambda s: [s[0], s[1] + 1]),
        2,
    ),
    "scale in groups of 64": (
        "native",
        changed("w1.scale", rebuilt=True, shape=lambda s: [s[0], s[1] // 2]),
        2,
    ),
    "scale of another dtype": ("native", changed("wq_b.scale", rebuilt=True, dtype="BF16"), 2),
    "one scale in float": ("native", changed("wkv.scale", rebuilt=True, dtype="F32"), 1),
    "tensors of NVFP4": ("native", added("ffn.experts.1.w1.weight_scale_2", "F32", [1]), 2),
    "an unknown tensor": ("bf16", added("attn.rotary.inv_freq", "F32", [8]), 2),
    "an expert beyond the last": ("native", expert_beyond, 2),
    "truncated": ("native", truncated, 2),
    "truncated in its header": ("fp8", truncated_in_its_header, 2),
    "deleted": ("bf16", deleted, 2),
    "deleted without an index": ("native", deleted_without_an_index, 2),
    "swapped": ("native", swapped, 2),
    "replaced by its neighbour": ("fp8", replaced_by_its_neighbour, 2),
    "misnamed": ("native", misnamed, 2),
    "trailing bytes": ("bf16", trailing_bytes, 2),
    "garbage in a header": ("native", garbage_header, 2),
    "endless header": ("native", endless_header, 2),
    "named twice in a header": ("fp8", named_twice, 2),
    "overlapping": ("native", overlapping, 2),
    "stale index entry": ("native", stale_entry, 2),
    "lying index entry": ("fp8", lying_entry, 2),
    "not in the index": ("bf16", unlisted, 2),
    "index leaves the directory": ("native", escaping_entry, 2),
    "wrong total_size": ("native", wrong_total, 1),
    "broken index": ("fp8", broken_index, 2),
    "extra file": ("native", extra_file, 1),
    "flipped expert_dtype": ("native", set_config(expert_dtype="fp8"), 2),
    "flipped expert_dtype of a Base": ("fp8", set_config(expert_dtype="fp4"), 2),
    "hidden_size": ("native", set_config(hidden_size=256), 2),
    "vocab_size": ("fp8", set_config(vocab_size=1280), 2),
    "heads": ("bf16", set_config(num_attention_heads=16), 2),
    "output groups": ("native", set_config(o_groups=2), 2),
    "experts": ("native", set_config(n_routed_experts=16), 2),
    "expert width": ("fp8", set_config(moe_intermediate_size=128), 2),
    "hash layers": ("native", set_config(num_hash_layers=1), 2),
    "kinds of layers": ("native", set_config(compress_ratios=[0, 0, 4, 128, 4, 4, 0]), 2),
    "a layer too few": ("bf16", a_layer_too_few, 2),
    "another network": ("native", set_config(model_type="deepseek_v3"), 2),
    "broken config": ("native", broken_config, 2),
    "another quant_method": ("native", quantisation(quant_method="gptq"), 2),
    "FP8 in other blocks": ("native", quantisation(weight_block_size=[64, 64]), 2),
}
"""Name to (kind of checkpoint, corruption, exit status)."""


def nan(ending: str, data: bytes) -> Corruption:
    def corrupt(copy: Copy, rng: random.Random) -> str:
        _, tensor = pick(copy, rng, ending)
        items = len(copy.read(tensor)) // len(data)
        return copy.poke(tensor, rng.randrange(items) * len(data), data)

    return corrupt


def scaled(ending: str, by: int, kind: str) -> Corruption:
    """All scales of a matrix with `by` more in their exponent."""

    def corrupt(copy: Copy, rng: random.Random) -> str:
        _, tensor = pick(copy, rng, ending)
        data = np.frombuffer(copy.read(tensor), kind)
        new = data * np.float32(2.0**by) if kind == "<f4" else data + np.uint8(by)
        copy.poke(tensor, 0, new.astype(kind).tobytes())
        return tensor.replace(".scale", ".weight")

    return corrupt


def hole(copy: Copy, rng: random.Random) -> str:
    tensor = rng.choice(["embed.weight", "head.weight"])
    return copy.poke(tensor, 4096 * rng.randrange(8), bytes(1 << 17))


DATA: dict[str, tuple[str, Corruption, int]] = {
    "NaN in a norm": ("native", nan("attn_norm.weight", b"\xc0\x7f"), 2),
    "infinity in a bias": ("native", nan("gate.bias", b"\x00\x00\x80\xff"), 2),
    "NaN code in FP8": ("native", nan("attn.wq_b.weight", b"\xff"), 2),
    "NaN code in an FP8 expert": ("fp8", nan("w2.weight", b"\x7f"), 2),
    "NaN scale": ("native", nan("w3.scale", b"\xff"), 2),
    "scale of zero": ("fp8", nan("attn.wo_b.scale", bytes(4)), 2),
    "negative scale": ("fp8", nan("w1.scale", np.float32(-0.5).tobytes()), 2),
    "no such expert": ("native", nan("tid2eid", np.int64(8).tobytes()), 2),
    "data that never arrived": ("native", hole, 1),
    "scales as numbers": ("native", scaled("attn.wkv.scale", 20, "u1"), 1),
    "an expert too loud": ("native", scaled("experts.2.w1.scale", 5, "u1"), 1),
    "an expert too quiet": ("fp8", scaled("experts.5.w2.scale", -5, "<f4"), 1),
}
"""The same for corruptions that only reading the data shows."""

"""What a config's fields say about how weights are stored, one opinion a stage.

Contract: reads `expert_dtype` and `quantization_config` in the dialects found in the wild (DeepSeek's
fp8, AMD Quark, compressed-tensors, NVIDIA ModelOpt, transformers' fp8 lists) and says a scheme's
name, or nothing. Patterns are matched as their own format defines: Quark and ModelOpt by shell globs
on the whole module name, compressed-tensors by equality, `re:` regular expressions or class names.
Torch-free. It knows no header and takes no decision (quant/resolve.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from fourfold.core.config import ModelConfig, expect
from fourfold.core.errors import QuantizationError
from fourfold.quant.headers import FP8_BLOCK, FP8_BLOCK_SIZE, MXFP4, MXFP4_GROUP, PLAIN

FIELD = "quantization_config"
NVFP4 = "NVFP4"


class Stage(Enum):
    """Where an opinion comes from, in the order in which they are asked."""

    HEADER = "header"
    EXPLICIT = "--expert-dtype"
    EXPERT_DTYPE = "expert_dtype"
    RULES = "per-layer rules"
    METHOD = "quant_method"
    FAMILY = "family default"


@dataclass(frozen=True, slots=True)
class StageOpinion:
    """What one stage says of one parameter. `scheme` None: it is silent; otherwise a supported
    scheme, or the name of one that is not. `reason` names the field and its value, or the tensor and
    its file. `binding`: a header that says otherwise contradicts it."""

    stage: Stage
    scheme: str | None
    reason: str
    binding: bool = False


_EXPERT_DTYPES = {
    "fp4": MXFP4,
    "mxfp4": MXFP4,
    "fp8": FP8_BLOCK,
    "fp8_block": FP8_BLOCK,
    "fp8_per_block": FP8_BLOCK,
    "bf16": PLAIN,
    "bfloat16": PLAIN,
    "nvfp4": NVFP4,
}


def expert_dtype_scheme(value: str) -> str:
    """The scheme a word for the routed experts' dtype stands for; unknown words name themselves."""
    return _EXPERT_DTYPES.get(value.lower(), f"expert dtype {value!r}")


Matcher = Callable[[str], bool]


@dataclass(frozen=True)
class _Rule:
    """`scheme` for every module that `matches`; `source` is the field and the pattern."""

    source: str
    matches: Matcher
    scheme: str


class ConfigOpinions:
    """The stages that a `ModelConfig` speaks in. Raises `ConfigError` where a field is malformed."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._quantization = config.quantization_config
        self._rules = tuple(_rules(self._quantization or {}))
        self._expert_dtype = self._read_expert_dtype()

    @property
    def has_rules(self) -> bool:
        """Whether there is any per-layer rule to match names with."""
        return bool(self._rules)

    @property
    def scale_fmt(self) -> object:
        """`quantization_config.scale_fmt`, a hint for planning without files."""
        return (self._quantization or {}).get("scale_fmt")

    def expert_dtype(self) -> tuple[StageOpinion, ...]:
        """One opinion for each field that names the routed experts' dtype, or one silent one."""
        return self._expert_dtype

    def _read_expert_dtype(self) -> tuple[StageOpinion, ...]:
        quantization = self._quantization or {}
        fields = [
            (f"{FIELD}.moe_quant_algo", quantization.get("moe_quant_algo")),
            ("expert_dtype", self._config.expert_dtype),
            (f"{FIELD}.expert_dtype", quantization.get("expert_dtype")),
        ]
        given = [(field, value) for field, value in fields if value is not None]
        for field, value in given:
            expect(isinstance(value, str), field, "a string", value)
        if given and given[0][0].endswith("moe_quant_algo"):
            given = given[:1]  # the more exact word: NVFP4 files say expert_dtype fp4 as well
        if not given:
            return (StageOpinion(Stage.EXPERT_DTYPE, None, "expert_dtype is not given"),)
        return tuple(
            StageOpinion(Stage.EXPERT_DTYPE, expert_dtype_scheme(value), f"{field} {value!r}", True)
            for field, value in given
        )

    def rule(self, modules: Sequence[str]) -> StageOpinion:
        """What the first rule that matches any of a module's names says."""
        for rule in self._rules:
            if any(rule.matches(module) for module in modules):
                return StageOpinion(Stage.RULES, rule.scheme, rule.source, True)
        return StageOpinion(
            Stage.RULES, None, "no rule matches" if self._rules else "there are no per-layer rules"
        )

    def method(self, expert: bool) -> StageOpinion:
        """What the config says of all weights at once."""
        scheme, reason = self._method(expert)
        absent = self._quantization is None
        return StageOpinion(Stage.METHOD, scheme, reason, expert and not absent)

    def _method(self, expert: bool) -> tuple[str | None, str]:
        q = self._quantization
        if q is None:
            says = {one.scheme for one in self._expert_dtype}
            absent = f"there is no {FIELD}"
            return (PLAIN if says <= {None, PLAIN} else None), absent
        method, algo = q.get("quant_method"), q.get("quant_algo")
        for name, value in (("quant_method", method), ("quant_algo", algo)):
            expect(value is None or isinstance(value, str), f"{FIELD}.{name}", "a string", value)
        reason = f"{FIELD}.quant_method {method!r}"
        if algo is not None and method in (None, "modelopt", "modelopt_fp4", "modelopt_mixed"):
            return _MODELOPT.get(algo, algo), f"{FIELD}.quant_algo {algo!r}"
        if method == "fp8":
            return _fp8_method(q, expert)
        if method == "mxfp4":
            return (MXFP4 if expert else None), reason
        if method == "quark":
            spec = _get(_get(q, "global_quant_config", FIELD), "weight", f"{FIELD}.global_quant_config")
            return _quark_scheme(spec), f"{reason}, global_quant_config"
        if method == "compressed-tensors":
            return (None if expert else PLAIN), f"{reason}, no group for it"
        if method is None:
            return None, f"{FIELD} names no quant_method"
        return f"quant_method {method!r}", reason


_MODELOPT: Mapping[str, str | None] = {
    "MIXED_PRECISION": None,
    "NVFP4": NVFP4,
    "FP8": "FP8 per tensor",
    "FP8_PB_WO": FP8_BLOCK,
    "MXFP4": MXFP4,
}


def _fp8_method(q: Mapping[str, Any], expert: bool) -> tuple[str | None, str]:
    """DeepSeek's own: it describes the linear layers. The routed experts of the FP4 and of the FP8
    releases come with the same fields, so it says nothing about them."""
    fmt, block = q.get("fmt", "e4m3"), q.get("weight_block_size")
    if fmt == "e2m1":
        return (MXFP4 if expert else None), f"{FIELD}.fmt 'e2m1'"
    reason = f"{FIELD}.quant_method 'fp8', fmt {fmt!r}"
    if expert:
        return None, f"{reason} leaves the routed experts open"
    if fmt not in ("e4m3", None):
        return f"FP8 in format {fmt!r}", f"{FIELD}.fmt {fmt!r}"
    if block is not None and tuple(block) != (FP8_BLOCK_SIZE, FP8_BLOCK_SIZE):
        shape = "×".join(map(str, block))
        return f"FP8 in blocks of {shape}", f"{FIELD}.weight_block_size {list(block)}"
    if q.get("activation_scheme") == "static":
        return "FP8 with static activation scales", f"{FIELD}.activation_scheme 'static'"
    return FP8_BLOCK, reason


def _get(parent: Mapping[str, Any], key: str, field: str) -> Mapping[str, Any]:
    """The object `parent[key]`; absent or null is an empty one."""
    value = parent.get(key)
    expect(value is None or isinstance(value, Mapping), f"{field}.{key}", "an object", value)
    return value or {}


def _names(parent: Mapping[str, Any], key: str, field: str) -> tuple[str, ...]:
    """The list of strings `parent[key]`; absent or null is an empty one."""
    value = parent.get(key)
    ok = value is None or (isinstance(value, tuple) and all(isinstance(v, str) for v in value))
    expect(ok, f"{field}.{key}", "a list of strings", value)
    return value or ()


def _rules(q: Mapping[str, Any]) -> Iterator[_Rule]:
    """All per-layer rules, those that come first decide."""
    for key in ("exclude", "exclude_modules"):
        for pattern in _names(q, key, FIELD):
            yield _Rule(f"{FIELD}.{key} {pattern!r}", _glob(pattern), PLAIN)
    for pattern in _names(q, "ignore", FIELD):
        yield _Rule(f"{FIELD}.ignore {pattern!r}", _ignored(pattern), PLAIN)
    for key in ("modules_to_not_convert", "ignored_layers"):
        for pattern in _names(q, key, FIELD):
            yield _Rule(f"{FIELD}.{key} {pattern!r}", _not_converted(pattern), PLAIN)
    yield from _quark_rules(q)
    yield from _modelopt_rules(q)
    yield from _group_rules(q)


def _quark_rules(q: Mapping[str, Any]) -> Iterator[_Rule]:
    for key in ("layer_quant_config", "layer_type_quant_config"):
        field = f"{FIELD}.{key}"
        for pattern, scheme in _get(q, key, FIELD).items():
            expect(isinstance(scheme, Mapping), f"{field}.{pattern}", "an object", scheme)
            name = _quark_scheme(_get(scheme, "weight", f"{field}.{pattern}"))
            by_type = key == "layer_type_quant_config"
            yield _Rule(f"{field} {pattern!r}", _type(pattern) if by_type else _glob(pattern), name)


def _quark_scheme(weight: Mapping[str, Any]) -> str:
    """Quark's description of one weight; none means that it is not quantised."""
    if not weight or weight.get("dtype") in ("bfloat16", "float16", "float32"):
        return PLAIN
    dtype, scheme, size = (weight.get(key) for key in ("dtype", "qscheme", "group_size"))
    if dtype in ("fp4", "fp4_e2m1", "mxfp4") and scheme == "per_group":
        return _fp4_scheme(size)
    if dtype in ("fp8_e4m3", "fp8") and scheme == "per_block":
        return FP8_BLOCK
    return f"Quark {dtype} {scheme}" + (f" in groups of {size}" if size else "")


def _fp4_scheme(group_size: object) -> str:
    if group_size == MXFP4_GROUP:
        return MXFP4
    return NVFP4 if group_size == 16 else f"FP4 in groups of {group_size}"


def _modelopt_rules(q: Mapping[str, Any]) -> Iterator[_Rule]:
    field = f"{FIELD}.quantized_layers"
    for module, layer in _get(q, "quantized_layers", FIELD).items():
        expect(isinstance(layer, Mapping), f"{field}.{module}", "an object", layer)
        algo = layer.get("quant_algo")
        scheme = _MODELOPT.get(str(algo), str(algo)) or f"quant_algo {algo}"
        yield _Rule(f"{field} {module!r}", _equal(module), scheme)


def _group_rules(q: Mapping[str, Any]) -> Iterator[_Rule]:
    """compressed-tensors: names go before patterns, patterns before classes, whatever the group."""
    rules: list[tuple[int, _Rule]] = []
    for name, group in _get(q, "config_groups", FIELD).items():
        field = f"{FIELD}.config_groups.{name}"
        expect(isinstance(group, Mapping), field, "an object", group)
        scheme = _group_scheme(_get(group, "weights", field))
        for target in _names(group, "targets", field):
            rule = _Rule(f"{field} target {target!r}", _target(target), scheme)
            order = 1 if target.startswith("re:") else 2 if target == "Linear" else 0
            rules.append((order, rule))
    yield from (rule for _, rule in sorted(rules, key=lambda pair: pair[0]))


def _group_scheme(weights: Mapping[str, Any]) -> str:
    if not weights:
        return PLAIN
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    size, block = weights.get("group_size"), weights.get("block_structure")
    if bits == 4 and kind == "float":
        return _fp4_scheme(size)
    if bits == 8 and kind == "float" and strategy == "block":
        whole = block is not None and tuple(block) == (FP8_BLOCK_SIZE, FP8_BLOCK_SIZE)
        return FP8_BLOCK if whole else f"FP8 in blocks of {block}"
    if bits == 8 and kind == "float":
        return f"FP8 per {strategy or 'tensor'}"
    return f"{kind or 'int'}{bits} weights" + (f" in groups of {size}" if size else "")


def _equal(pattern: str) -> Matcher:
    wanted = pattern.rstrip(".")
    return lambda module: module == wanted


def _glob(pattern: str) -> Matcher:
    """Shell pattern on the whole name. `a.experts` and `a.experts.` are the same module."""
    if pattern.startswith("re:"):
        return _regex(pattern)
    wanted = pattern.rstrip(".")
    return lambda module: fnmatchcase(module, wanted)


def _regex(pattern: str) -> Matcher:
    try:
        compiled = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise QuantizationError(
            f"{FIELD}: {pattern!r} is no regular expression: {error}"
        ) from None
    return lambda module: compiled.match(module) is not None


def _type(name: str) -> Matcher:
    """A class name: every quantisable weight here belongs to a linear layer."""
    return lambda module: name == "Linear"


def _target(pattern: str) -> Matcher:
    if pattern.startswith("re:"):
        return _regex(pattern)
    return _type(pattern) if pattern == "Linear" else _equal(pattern)


def _ignored(pattern: str) -> Matcher:
    """compressed-tensors has names, `re:` and classes here; ModelOpt globs. No name holds a `*`."""
    return _target(pattern) if pattern.startswith("re:") or "*" not in pattern else _glob(pattern)


def _not_converted(pattern: str) -> Matcher:
    """transformers' fp8: a regular expression from the start to a module boundary, or a suffix."""
    matches = _regex(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))")
    return lambda module: matches(module) or module.endswith(pattern)


def module_names(weight_names: Iterable[str]) -> tuple[str, ...]:
    """Module names of weights: without the last part, each once."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in weight_names))

"""What a config's fields say about how weights are stored, one opinion a stage.

Contract: reads `expert_dtype` and `quantization_config` in the dialects found in the wild
(DeepSeek's fp8, AMD Quark, compressed-tensors, NVIDIA ModelOpt, transformers' fp8 lists) and says a
scheme's name, or nothing. Patterns are matched as their own format defines: Quark and ModelOpt by
shell globs on the whole module name, compressed-tensors by equality, `re:` regular expressions or
class names. Torch-free. It knows no header and takes no decision (quant/resolve.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from fourfold.core.config import ModelConfig, expect
from fourfold.core.errors import QuantizationError
from fourfold.quant.headers import FP8_BLOCK, FP8_BLOCK_SIZE, MXFP4, MXFP4_GROUP, PLAIN

FIELD = "quantization_config"
NVFP4 = "NVFP4"
LINEAR_CLASS = "Linear"
"""The class that rules by class name mean: every quantisable weight belongs to a linear layer."""


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
    scheme, or the name of one that is not. `reason` names the field and its value, or the tensor
    and its file, and is empty where the stage is about other parameters. `binding`: a header that
    says otherwise contradicts it."""

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
    """`scheme` for the module called `name`, for every one that `matches`, or with neither for all;
    `source` is the field and the pattern."""

    source: str
    scheme: str
    name: str | None = None
    matches: Matcher | None = None

    @property
    def is_general(self) -> bool:
        return self.name is None and self.matches is None


class ConfigOpinions:
    """The stages a `ModelConfig` speaks in. Raises `ConfigError` where a field is malformed."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._quantization = config.quantization_config
        rules = list(enumerate(_rules(self._quantization or {})))
        self.has_rules = bool(rules)
        self._patterns = [(order, rule) for order, rule in rules if rule.name is None]
        self._exact: dict[str, tuple[int, _Rule]] = {}
        for order, rule in rules:
            if rule.name is not None:
                self._exact.setdefault(rule.name, (order, rule))
        self._expert_dtype = self._read_expert_dtype()

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
            # The more exact word: files with NVFP4 experts say expert_dtype fp4 as well.
            field, algo = given[0]
            scheme = _MODELOPT.get(algo, algo)
            return (StageOpinion(Stage.EXPERT_DTYPE, scheme, f"{field} {algo!r}", True),)
        if not given:
            return (StageOpinion(Stage.EXPERT_DTYPE, None, "expert_dtype is not given"),)
        return tuple(
            StageOpinion(Stage.EXPERT_DTYPE, expert_dtype_scheme(value), f"{field} {value!r}", True)
            for field, value in given
        )

    def rule(self, modules: Sequence[str], expert: bool) -> StageOpinion:
        """What the first rule that matches any of a module's names says.

        A rule that leaves a linear layer alone does not bind, as it may have been quantised before,
        nor does one about all linear layers, as those have exceptions.
        """
        hits = [self._exact[module] for module in modules if module in self._exact]
        best = min(hits, key=lambda hit: hit[0], default=None)
        for order, rule in self._patterns:
            if best is not None and order > best[0]:
                break
            if rule.matches is None or any(map(rule.matches, modules)):
                best = (order, rule)
                break
        if best is not None:
            rule = best[1]
            binding = expert or not (rule.is_general or rule.scheme == PLAIN)
            return StageOpinion(Stage.RULES, rule.scheme, rule.source, binding)
        silent = "no per-layer rule is for it" if self.has_rules else "there are no per-layer rules"
        return StageOpinion(Stage.RULES, None, silent)

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
            everything = _get(q, "global_quant_config", FIELD)
            weight = _get(everything, "weight", f"{FIELD}.global_quant_config")
            return _quark_scheme(weight), f"{reason}, global_quant_config"
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
    fmt, block = q.get("fmt") or "e4m3", q.get("weight_block_size")
    field = f"{FIELD}.weight_block_size"
    expect(block is None or isinstance(block, tuple), field, "a list of two integers", block)
    if fmt == "e2m1":
        return (MXFP4 if expert else None), f"{FIELD}.fmt 'e2m1'"
    reason = f"{FIELD}.quant_method 'fp8', fmt {fmt!r}"
    if expert:
        return None, f"{reason} leaves the routed experts open"
    if fmt != "e4m3":
        return f"FP8 in format {fmt!r}", f"{FIELD}.fmt {fmt!r}"
    if block is not None and block != (FP8_BLOCK_SIZE, FP8_BLOCK_SIZE):
        shape = "×".join(map(str, block))
        return f"FP8 in blocks of {shape}", f"{field} {list(block)}"
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
    """All per-layer rules; those that come first decide."""
    for key in ("exclude", "exclude_modules"):
        for pattern in _names(q, key, FIELD):
            yield _glob(f"{FIELD}.{key} {pattern!r}", PLAIN, pattern)
    for pattern in _names(q, "ignore", FIELD):
        # compressed-tensors has names, `re:` and classes here; ModelOpt has globs.
        match = _glob if "*" in pattern and not pattern.startswith("re:") else _target
        yield match(f"{FIELD}.ignore {pattern!r}", PLAIN, pattern)
    for key in ("modules_to_not_convert", "ignored_layers"):
        for pattern in _names(q, key, FIELD):
            yield _not_converted(f"{FIELD}.{key} {pattern!r}", pattern)
    yield from _quark_rules(q)
    yield from _modelopt_rules(q)
    yield from _group_rules(q)


def _quark_rules(q: Mapping[str, Any]) -> Iterator[_Rule]:
    for key, match in (("layer_quant_config", _glob), ("layer_type_quant_config", _target)):
        field = f"{FIELD}.{key}"
        for pattern, scheme in _get(q, key, FIELD).items():
            expect(isinstance(scheme, Mapping), f"{field}.{pattern}", "an object", scheme)
            weight = _get(scheme, "weight", f"{field}.{pattern}")
            yield match(f"{field} {pattern!r}", _quark_scheme(weight), pattern)


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
        scheme = _MODELOPT.get(str(algo)) or str(algo)
        yield _Rule(f"{field} {module!r}", scheme, name=module.rstrip("."))


def _group_rules(q: Mapping[str, Any]) -> Iterator[_Rule]:
    """compressed-tensors: names go before patterns, patterns before classes, whatever the group."""
    rules: list[tuple[int, _Rule]] = []
    for name, group in _get(q, "config_groups", FIELD).items():
        field = f"{FIELD}.config_groups.{name}"
        expect(isinstance(group, Mapping), field, "an object", group)
        scheme = _group_scheme(_get(group, "weights", field))
        for target in _names(group, "targets", field):
            order = 1 if target.startswith("re:") else 2 if target == LINEAR_CLASS else 0
            rules.append((order, _target(f"{field} target {target!r}", scheme, target)))
    yield from (rule for _, rule in sorted(rules, key=lambda pair: pair[0]))


_BLOCK_STRUCTURES = ((FP8_BLOCK_SIZE, FP8_BLOCK_SIZE), f"{FP8_BLOCK_SIZE}x{FP8_BLOCK_SIZE}")


def _group_scheme(weights: Mapping[str, Any]) -> str:
    if not weights:
        return PLAIN
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    size, block = weights.get("group_size"), weights.get("block_structure")
    if bits == 4 and kind == "float":
        return _fp4_scheme(size)
    if bits == 8 and kind == "float" and strategy == "block":
        return FP8_BLOCK if block in _BLOCK_STRUCTURES else f"FP8 in blocks of {block}"
    if bits == 8 and kind == "float":
        return f"FP8 per {strategy or 'tensor'}"
    return f"{kind or 'int'}{bits} weights" + (f" in groups of {size}" if size else "")


def _glob(source: str, scheme: str, pattern: str) -> _Rule:
    """A shell pattern on the whole name. `a.experts` and `a.experts.` are the same module."""
    if pattern.startswith("re:"):
        return _Rule(source, scheme, matches=_regex(pattern.removeprefix("re:"), source))
    wanted = pattern.rstrip(".")
    if not set("*?[") & set(wanted):
        return _Rule(source, scheme, name=wanted)
    return _Rule(source, scheme, matches=lambda module: fnmatchcase(module, wanted))


def _target(source: str, scheme: str, pattern: str) -> _Rule:
    """compressed-tensors: a `re:` pattern from the start of the name, a class, or a whole name."""
    if pattern.startswith("re:"):
        return _Rule(source, scheme, matches=_regex(pattern.removeprefix("re:"), source))
    if pattern == LINEAR_CLASS:
        return _Rule(source, scheme)
    return _Rule(source, scheme, name=pattern.rstrip("."))


def _not_converted(source: str, pattern: str) -> _Rule:
    """transformers' fp8: a regular expression from the start to a module boundary, or a suffix."""
    matches = _regex(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", source)
    return _Rule(source, PLAIN, matches=lambda name: matches(name) or name.endswith(pattern))


def _regex(pattern: str, source: str) -> Matcher:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise QuantizationError(f"{source} is no regular expression: {error}") from None
    return lambda module: compiled.match(module) is not None

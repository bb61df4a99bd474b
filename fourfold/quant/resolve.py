"""Which scheme stores each quantisable parameter, and why.

Contract: `resolve` asks six stages about every linear layer and every layer's routed experts, keeps
all their answers, and decides. With files the header decides, and a field that contradicts it is an
error naming both, unless `--expert-dtype` confirms the header; silence is never a contradiction.
Without files the first stage that speaks decides. A scheme without an implementation is refused by
name. Everything is looked up by `Role`. Torch-free; it reads no file, and knows neither how the
schemes store numbers (the other files here) nor the spellings of names (it is given them).

    header > --expert-dtype > expert_dtype > per-layer rules > quant_method, fmt > family default
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from fourfold.core.checkpoint import TensorHeader
from fourfold.core.config import EXPERT_DTYPES, ModelConfig, expect_choice
from fourfold.core.errors import QuantizationError
from fourfold.core.frozen import FrozenDict
from fourfold.core.parameters import EXPERT_ROLES, ParamSpec, Role, Storage, parameters
from fourfold.quant.headers import (
    E8M0,
    F32,
    FP8_BLOCK,
    MXFP4,
    PLAIN,
    SCHEMES,
    SUPPORTED,
    Finding,
    StoredWeight,
    classify,
    gather,
)
from fourfold.quant.rules import (
    ConfigOpinions,
    Stage,
    StageOpinion,
    expert_dtype_scheme,
    module_names,
)

_CONFIG_STAGES = (Stage.EXPERT_DTYPE, Stage.RULES, Stage.METHOD)


@dataclass(frozen=True)
class Decision:
    """How one parameter is stored: `scheme` is "plain", "fp8_block" or "mxfp4"; `scale_format` is
    "e8m0", "f32" or None (plain). `stage` and `reason` say what decided; `stages` is every opinion in
    the order of asking."""

    scheme: str
    scale_format: str | None
    stage: Stage
    reason: str
    stages: tuple[StageOpinion, ...]


@dataclass(frozen=True)
class Resolution:
    """A decision for every linear and routed-expert parameter, by layer prefix and role."""

    decisions: Mapping[tuple[str, Role], Decision]

    def decision(self, prefix: str, role: Role) -> Decision:
        """For the layer `prefix`, with or without its trailing dot. `KeyError` if the parameter does
        not exist or is never quantised."""
        return self.decisions[_dotted(prefix), role]

    def of(self, spec: ParamSpec) -> Decision | None:
        """The decision for `spec`, None if that kind of parameter is never quantised."""
        return self.decisions.get((spec.prefix, spec.role))

    def lines(self) -> tuple[str, ...]:
        """For the log: one line for each way in which parameters came to be stored."""
        groups: dict[tuple[object, ...], list[tuple[str, Role]]] = {}
        for (prefix, role), one in self.decisions.items():
            answers = tuple((opinion.stage, opinion.scheme) for opinion in one.stages)
            kind = role in EXPERT_ROLES
            key = (not kind, one.scheme, one.scale_format, one.stage, answers)
            groups.setdefault(key, []).append((prefix, role))
        ordered = sorted(groups.items(), key=lambda item: (bool(item[0][0]), -len(item[1])))
        return tuple(self._line(members) for _, members in ordered)

    def _line(self, members: list[tuple[str, Role]]) -> str:
        one = self.decisions[members[0]]
        roles = dict.fromkeys(role for _, role in members)
        layers = len({prefix for prefix, _ in members})
        if members[0][1] in EXPERT_ROLES:
            what = "routed experts"
        else:
            what = "linear layers (" + ", ".join(_short(role) for role in roles) + ")"
        scheme = one.scheme + (f" with {one.scale_format} scales" if one.scale_format else "")
        rest = "; ".join(
            _verdict(opinion, one) for opinion in one.stages if opinion.stage is not one.stage
        )
        where = f"in {layers} layer{'s' if layers > 1 else ''}"
        return f"{what}: {scheme} {where}, decided by {one.stage.value} ({one.reason}); {rest}"


def _short(role: Role) -> str:
    return role.value.removesuffix(".weight")


def _dotted(prefix: str) -> str:
    return prefix if prefix.endswith(".") or not prefix else prefix + "."


def _verdict(opinion: StageOpinion, decided: Decision) -> str:
    if opinion.scheme is None:
        return f"{opinion.stage.value}: silent, {opinion.reason}"
    if opinion.scheme == decided.scheme:
        return f"{opinion.stage.value}: {opinion.reason} agrees"
    return f"{opinion.stage.value}: {opinion.reason} says {opinion.scheme} and is overruled"


def same_name(name: str) -> tuple[str, ...]:
    """Names as they are: for headers already in the native spelling."""
    return (name,)


def resolve(
    config: ModelConfig,
    headers: Mapping[str, TensorHeader] | None = None,
    expert_dtype: str = "auto",
    native: Callable[[str], Iterable[str]] = same_name,
) -> Resolution:
    """Decide for every linear layer and every routed expert of `config`.

    `headers`: all tensors of the checkpoint under the file's names, or None when planning without
    files. `expert_dtype`: the value of `--expert-dtype`. `native`: the native names a weight's file
    name stands for (`layers.0.ffn.experts.3.w1.weight`, or `layers.0.ffn.experts.w1.weight` for all
    experts stacked); none for a tensor that is no weight. Raises `QuantizationError`.
    """
    expect_choice("--expert-dtype", expert_dtype, EXPERT_DTYPES)
    resolver = _Resolver(config, headers, expert_dtype, native)
    return Resolution(FrozenDict(resolver.decisions()))


class _Resolver:
    """One run of `resolve`: its inputs, gathered once."""

    def __init__(
        self,
        config: ModelConfig,
        headers: Mapping[str, TensorHeader] | None,
        expert_dtype: str,
        native: Callable[[str], Iterable[str]],
    ) -> None:
        self._config = config
        self._specs = [
            spec
            for spec in parameters(config)
            if spec.storage in (Storage.LINEAR, Storage.EXPERT)
        ]
        self._has_files = headers is not None
        self._stored = gather(self._specs, headers or {}, native)
        self._explicit = expert_dtype
        self._config_says = ConfigOpinions(config)

    def decisions(self) -> dict[tuple[str, Role], Decision]:
        findings = {spec.name: self._find(spec) for spec in self._specs}
        self._check_experts(findings)
        result: dict[tuple[str, Role], Decision] = {}
        experts_first = sorted(self._specs, key=lambda spec: spec.storage is not Storage.EXPERT)
        for spec in experts_first:
            found = findings[spec.name]
            stages = tuple(self._opinions(spec, found[0] if found else None))
            fp8_experts = any(one.scheme == FP8_BLOCK for key, one in result.items() if key[1] in EXPERT_ROLES)
            result[spec.prefix, spec.role] = self._decide(spec, found, stages)
        return {(spec.prefix, spec.role): result[spec.prefix, spec.role] for spec in self._specs}

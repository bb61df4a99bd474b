"""Which scheme stores each quantisable parameter, and why.

Contract: `resolve` asks six stages about every linear layer and every layer's routed experts, keeps
all their answers, and decides. With files the header decides, and a field that contradicts it is an
error naming both, unless `--expert-dtype` confirms the header; silence is never a contradiction.
Without files the first stage that speaks decides. A scheme without an implementation is refused by
name. Whoever wants to hear of every such error gives a `report` that does not raise. Everything is
looked up by `Role`. Torch-free; it reads no file, and knows neither how the schemes store numbers
(the other files here) nor the spellings of names (it is given them).

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
)


@dataclass(frozen=True)
class Decision:
    """How one parameter is stored: `scheme` is "plain", "fp8_block" or "mxfp4"; `scale_format` is
    "e8m0", "f32" or None (plain). `stage` and `reason` say what decided; `stages` is every opinion
    in the order of asking."""

    scheme: str
    scale_format: str | None
    stage: Stage
    reason: str
    stages: tuple[StageOpinion, ...]


@dataclass(frozen=True)
class Fault:
    """What `resolve` refuses, in one sentence. `header` is the weight it is about, if it is about one;
    `opinion` the field that contradicts that header, if that is what is wrong."""

    text: str
    header: TensorHeader | None = None
    opinion: StageOpinion | None = None


Report = Callable[[Fault], None]


def refuse(fault: Fault) -> None:
    """The report of those who stop at the first fault."""
    raise QuantizationError(fault.text)


@dataclass(frozen=True)
class Resolution:
    """A decision for every linear and routed-expert parameter, by layer prefix and role."""

    decisions: Mapping[tuple[str, Role], Decision]

    def decision(self, prefix: str, role: Role) -> Decision:
        """For the layer `prefix`, with or without its trailing dot. `KeyError` if the parameter
        does not exist or is never quantised."""
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
        scheme = _stored_as(one)
        others = (opinion for opinion in one.stages if opinion.stage is not one.stage)
        rest = "; ".join(_verdict(opinion, one) for opinion in others if opinion.reason)
        where = f"in {layers} layer{'s' if layers > 1 else ''}"
        return f"{what}: {scheme} {where}, decided by {one.stage.value} ({one.reason}); {rest}"


def _short(role: Role) -> str:
    return role.value.removesuffix(".weight")


def _dotted(prefix: str) -> str:
    return prefix if prefix.endswith(".") or not prefix else prefix + "."


def _verdict(opinion: StageOpinion, decided: Decision) -> str:
    if opinion.scheme is None:
        return opinion.reason
    if opinion.scheme == decided.scheme:
        return f"{opinion.reason} agrees"
    return f"{opinion.reason} ({opinion.scheme}) is overruled"


def same_name(name: str) -> tuple[str, ...]:
    """Names as they are: for headers already in the native spelling."""
    return (name,)


def resolve(
    config: ModelConfig,
    headers: Mapping[str, TensorHeader] | None = None,
    expert_dtype: str = "auto",
    native: Callable[[str], Iterable[str]] = same_name,
    report: Report = refuse,
) -> Resolution:
    """Decide for every linear layer and every routed expert of `config`.

    `headers`: all tensors of the checkpoint under the file's names, or None when planning without
    files. `expert_dtype`: the value of `--expert-dtype`. `native`: the native names a weight's file
    name stands for (`layers.0.ffn.experts.3.w1.weight`, or `layers.0.ffn.experts.w1.weight` for all
    experts stacked); none for a tensor that is no weight. Raises `QuantizationError`, unless `report`
    returns: then what a fault is about is left out, and headers decide against fields.
    """
    expect_choice("--expert-dtype", expert_dtype, EXPERT_DTYPES)
    specs = [s for s in parameters(config) if s.storage in (Storage.EXPERT, Storage.LINEAR)]
    stored = gather(specs, headers or {}, native)
    found = {spec.name: _find(spec, stored[spec.name], report) for spec in specs}
    _check_layers(specs, found, report)
    says = ConfigOpinions(config)
    silent = "there are no files" if headers is None else "the files do not hold it"
    decided: dict[str, Decision] = {}
    fp8_experts = False
    for spec in sorted(specs, key=lambda spec: spec.storage is not Storage.EXPERT):
        names = _module_names(spec, stored[spec.name], config) if says.has_rules else []
        stages = (
            _header_opinion(found[spec.name], silent),
            _explicit_opinion(spec, expert_dtype),
            *_config_opinions(spec, says, names),
            _family_opinion(spec),
        )
        first = next(one.scheme for one in stages if one.scheme is not None)
        fp8_experts |= spec.storage is Storage.EXPERT and first == FP8_BLOCK
        if found[spec.name]:
            header = stored[spec.name][0].weight
            for fault in _contradictions(spec, stages, found[spec.name][0], header):
                report(fault)
        decided[spec.name] = _decide(spec, stages, found[spec.name], says.scale_fmt, fp8_experts)
    return Resolution(FrozenDict({(s.prefix, s.role): decided[s.name] for s in specs}))


def _find(spec: ParamSpec, stored: Iterable[StoredWeight], report: Report) -> tuple[Finding, ...]:
    found = []
    for one in stored:
        try:
            found.append(classify(one, spec.shape[-1]))
        except QuantizationError as error:
            report(Fault(str(error), one.weight))
    return tuple(found)


def _check_layers(
    specs: Iterable[ParamSpec], found: Mapping[str, tuple[Finding, ...]], report: Report
) -> None:
    """All routed experts of a layer are computed as one, so they must be stored alike."""
    first: dict[str, Finding] = {}
    for spec in specs:
        if spec.storage is not Storage.EXPERT:
            continue
        for finding in found[spec.name]:
            other = first.setdefault(spec.prefix, finding)
            if (other.scheme, other.scale_format) != (finding.scheme, finding.scale_format):
                text = (
                    f"the routed experts of {spec.prefix.rstrip('.')} are stored in two formats: "
                    f"{other.reason} ({_stored_as(other)}), but {finding.reason} "
                    f"({_stored_as(finding)}); one layer's experts must share one"
                )
                report(Fault(text))
                break


def _stored_as(finding: Finding | Decision) -> str:
    scales = f" with {finding.scale_format} scales" if finding.scale_format else ""
    return finding.scheme + scales


def _module_names(
    spec: ParamSpec, stored: tuple[StoredWeight, ...], config: ModelConfig
) -> list[tuple[str, ...]]:
    """The names that a per-layer rule may know each matrix of `spec` by, one tuple for each expert.

    The file's own and the native one, with and without `model.`; for the MTP layer also the number
    that follows the main layers'; for an expert also the module that holds all of its layer's.
    """
    native = spec.checkpoint_names
    files = [one.weight.name for one in stored]
    if len(files) != len(native):
        files = files * len(native) if len(files) == 1 else list(native)
    return [
        _aliases((one, file), spec.storage is Storage.EXPERT, config.num_hidden_layers)
        for one, file in zip(native, files, strict=True)
    ]


def _aliases(names: Iterable[str], expert: bool, layers: int) -> tuple[str, ...]:
    modules: list[str] = []
    for name in names:
        module = name.rpartition(".")[0].removeprefix("model.")
        spellings = [module]
        if expert and module.split(".")[-2].isdecimal():
            spellings.append(module.rsplit(".", 2)[0])
        for spelling in tuple(spellings):
            if spelling.startswith("mtp."):
                _, stage, rest = spelling.split(".", 2)
                spellings.append(f"layers.{layers + int(stage)}.{rest}")
        modules += spellings
        modules += [f"model.{spelling}" for spelling in spellings]
    return tuple(dict.fromkeys(modules))


def _header_opinion(found: tuple[Finding, ...], silent: str) -> StageOpinion:
    if not found:
        return StageOpinion(Stage.HEADER, None, silent)
    return StageOpinion(Stage.HEADER, found[0].scheme, found[0].reason)


def _explicit_opinion(spec: ParamSpec, expert_dtype: str) -> StageOpinion:
    if spec.storage is not Storage.EXPERT:
        return StageOpinion(Stage.EXPLICIT, None, "")
    scheme = None if expert_dtype == "auto" else expert_dtype_scheme(expert_dtype)
    return StageOpinion(Stage.EXPLICIT, scheme, f"--expert-dtype {expert_dtype}")


def _config_opinions(
    spec: ParamSpec, says: ConfigOpinions, names: list[tuple[str, ...]]
) -> Iterator[StageOpinion]:
    expert = spec.storage is Storage.EXPERT
    if expert:
        yield from says.expert_dtype()
    else:
        yield StageOpinion(Stage.EXPERT_DTYPE, None, "")
    yield _rule_opinion(spec, says, names)
    yield says.method(expert)


def _rule_opinion(
    spec: ParamSpec, says: ConfigOpinions, names: list[tuple[str, ...]]
) -> StageOpinion:
    """One opinion for all experts of a layer; rules that tell them apart are refused."""
    first: StageOpinion | None = None
    for modules in names or [()]:
        opinion = says.rule(modules, spec.storage is Storage.EXPERT)
        if first is not None and opinion.scheme != first.scheme:
            raise QuantizationError(
                f"{spec.name}: {first.reason} gives {first.scheme} to some of its experts and "
                f"{opinion.reason} gives {opinion.scheme} to others; one layer's experts must "
                "share one scheme"
            )
        first = first or opinion
    assert first is not None
    return first


def _family_opinion(spec: ParamSpec) -> StageOpinion:
    scheme = MXFP4 if spec.storage is Storage.EXPERT else FP8_BLOCK
    return StageOpinion(Stage.FAMILY, scheme, "DeepSeek-V4 as released")


def _decide(
    spec: ParamSpec,
    stages: tuple[StageOpinion, ...],
    found: tuple[Finding, ...],
    scale_fmt: object,
    fp8_experts: bool,
) -> Decision:
    if found:
        return Decision(
            found[0].scheme, found[0].scale_format, Stage.HEADER, found[0].reason, stages
        )
    first = next(opinion for opinion in stages if opinion.scheme is not None)
    _check_planned(spec, stages, first)
    assert first.scheme is not None
    scale_format = _planned_scale(first.scheme, scale_fmt, fp8_experts)
    return Decision(first.scheme, scale_format, first.stage, first.reason, stages)


def _contradictions(
    spec: ParamSpec, stages: tuple[StageOpinion, ...], found: Finding, header: TensorHeader
) -> Iterator[Fault]:
    """With files: an override must fit the bytes, and a field may not say otherwise unconfirmed."""
    explicit = next(opinion for opinion in stages if opinion.stage is Stage.EXPLICIT)
    words = {MXFP4: "fp4", FP8_BLOCK: "fp8", PLAIN: "bf16"}
    if explicit.scheme not in (None, found.scheme):
        text = (
            f"{explicit.reason} asks for {explicit.scheme}, but {found.reason} ({found.scheme}): "
            f"the bytes cannot be read so; use --expert-dtype auto or {words[found.scheme]}"
        )
        yield Fault(text, header, explicit)
    for opinion in stages:
        if opinion.scheme in (None, found.scheme) or not _binds(opinion, found):
            continue
        if explicit.scheme == found.scheme:
            continue
        text = f"{opinion.reason} says {opinion.scheme}, but {found.reason} ({found.scheme}); "
        if spec.storage is Storage.EXPERT:
            text += f"if the file is right, confirm it with --expert-dtype {words[found.scheme]}"
        else:
            text += "correct the field"
        yield Fault(text, header, opinion)


def _binds(opinion: StageOpinion, found: Finding) -> bool:
    """Whether a header that says otherwise contradicts `opinion`. What a config says of all linear
    layers at once has exceptions (plain `wo_a`, plain MTP projections), so that of those only a
    scheme without an implementation binds."""
    if opinion.binding or opinion.stage is Stage.FAMILY:
        return opinion.binding
    return opinion.scheme not in SCHEMES and found.scheme != PLAIN


def _check_planned(spec: ParamSpec, stages: tuple[StageOpinion, ...], first: StageOpinion) -> None:
    """Without files: fields may not contradict each other, nor name what is not implemented."""
    if first.stage is Stage.EXPLICIT:
        return
    for opinion in stages:
        same_stage = opinion.stage is first.stage and opinion.scheme != first.scheme
        if same_stage and opinion.scheme is not None:
            raise QuantizationError(
                f"{first.reason} says {first.scheme}, but {opinion.reason} says {opinion.scheme}; "
                "correct one of them or decide with --expert-dtype"
            )
        asked = opinion is first or first.stage is Stage.EXPERT_DTYPE
        if asked and opinion.scheme not in (None, *SCHEMES):
            raise QuantizationError(
                f"{opinion.reason}: {spec.name} would be stored as {opinion.scheme}, which is not "
                f"supported; {SUPPORTED}"
            )


def _planned_scale(scheme: str, scale_fmt: object, fp8_experts: bool) -> str | None:
    """Without files, the scale format of the released checkpoint that this config resembles: the
    FP8 ones hold float32 scales, although their config says `ue8m0` as well."""
    if scheme == PLAIN:
        return None
    if scheme == MXFP4:
        return E8M0
    return E8M0 if scale_fmt == "ue8m0" and not fp8_experts else F32

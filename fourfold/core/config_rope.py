"""The rotary embedding's settings, from any of the shapes that config files give them.

Contract: `read_rope` yields the two bases and YaRN's numbers, or raises `ConfigError`/`FieldError`:
only the plain rotation and YaRN without amplitude scaling exist in DeepSeek-V4. Shapes understood:
`rope_scaling` (released), `rope_parameters` flat or {main, compress} (transformers), and the four
flat keys of the reference program. It does not know how the rotation is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fourfold.core import config_keys as keys
from fourfold.core.config import FieldError, RopeScaling, expect, expect_positive, short
from fourfold.core.config_fields import Keys

Rope = tuple[Any, Any, RopeScaling | None, list[tuple[str, Any]]]
"""rope_theta, compress_rope_theta, YaRN or None, and the partial rotary factors met on the way."""


def read_rope(found: Keys) -> Rope:
    """Both bases, YaRN of the compressed layers, and any partial rotary factors."""
    main = found.candidates(("rope_theta",))
    compress = found.candidates(("compress_rope_theta",))
    scalings: list[tuple[str, RopeScaling | None]] = []
    factors: list[tuple[str, Any]] = []

    def read(name: str, value: object, bases: list[tuple[str, Any]]) -> RopeScaling | None:
        scaling, here = _rope_object(found, name, value)
        if here.get("rope_theta") is not None:
            bases.append((f"{name}.rope_theta", here["rope_theta"]))
        if here.get("partial_rotary_factor") is not None:
            factors.append((f"{name}.partial_rotary_factor", here["partial_rotary_factor"]))
        return scaling

    for name, value in found.candidates(("rope_scaling", "rope_parameters")):
        nested = isinstance(value, Mapping) and value.keys() & {"main", "compress"}
        if not nested:
            scalings.append((name, read(name, value, main)))
            continue
        expect(value.keys() >= {"main", "compress"}, name, "given with main and compress", value)
        plain = read(f"{name}.main", value["main"], main) is None
        kind = f"{name}.main.rope_type"
        expect(plain, kind, "default: YaRN belongs to the compressed layers", "yarn")
        scalings.append((f"{name}.compress", read(f"{name}.compress", value["compress"], compress)))
        found.unknown_nested += [f"{name}.{k}" for k in value if k not in ("main", "compress")]
    scalings += _reference_rope(found)
    theta, compress_theta = found.agree("rope_theta", main), found.agree("compress", compress)
    for field, base in (("rope_theta", theta), ("compress_rope_theta", compress_theta)):
        if base is None:
            found.fail(f"missing key: {field}")
        expect_positive(field, base)
    return theta, compress_theta, found.agree("rope_scaling", scalings), factors


def _rope_object(
    found: Keys, name: str, value: object
) -> tuple[RopeScaling | None, Mapping[str, Any]]:
    """One rope object as YaRN (or None for the plain rotation), and its other keys."""
    expect(isinstance(value, Mapping), name, "an object", value)
    assert isinstance(value, Mapping)
    here = {key: item for key, item in value.items() if item is not None}
    found.unknown_nested += [f"{name}.{key}" for key in here if key not in keys.ROPE_KEYS]
    kinds = [(f"{name}.{key}", here[key]) for key in ("type", "rope_type") if key in here]
    kind = found.agree(name, kinds)
    found.spelling.pop(name, None)
    expect(kind in ("yarn", "default"), f"{name}.type", "yarn (or default: no scaling)", kind)
    for key in ("mscale", "mscale_all_dim"):
        if key in here:
            found.fail(
                f"{name}.{key} is {short(here[key])}: DeepSeek-V4 has no amplitude scaling, and "
                "none is implemented"
            )
    for key, only in (("attention_factor", 1), ("truncate", True)):
        expect(here.get(key, only) == only, f"{name}.{key}", f"{only} or absent", here.get(key))
    if kind == "default":
        extra = here.keys() & {"factor", "original_max_position_embeddings"}
        expect(not extra, f"{name}.type", "yarn where a factor or a length is given", kind)
        return None, here
    names = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    return _yarn(found, name, {key: here[key] for key in names if key in here}), here


def _yarn(found: Keys, name: str, given: dict[str, Any]) -> RopeScaling:
    for key in ("factor", "original_max_position_embeddings"):
        if key not in given:
            found.fail(f"missing key: {name}.{key}")
    for key, default in (("beta_fast", 32), ("beta_slow", 1)):
        if key not in given:
            found.note(f"{name}.{key} is not in this file; {default} is used")
    try:
        return RopeScaling(**given)
    except FieldError as error:
        field = error.field.replace("rope_scaling", name, 1)
        raise FieldError(field, error.expected, error.found) from None


def _reference_rope(found: Keys) -> list[tuple[str, RopeScaling | None]]:
    """YaRN under the reference program's four flat keys; a length of 0 switches it off there."""
    spellings = {
        "factor": "rope_factor",
        "original_max_position_embeddings": "original_seq_len",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
    }
    if not found.data.keys() & {"rope_factor", "original_seq_len"}:
        return []
    given = {
        field: value for field, key in spellings.items() for _, value in found.candidates((key,))
    }
    if given.get("original_max_position_embeddings") == 0:
        return [("original_seq_len", None)]
    try:
        return [("rope_factor", _yarn(found, "rope_scaling", given))]
    except FieldError as error:
        field = spellings[error.field.removeprefix("rope_scaling.")]
        raise FieldError(field, error.expected, error.found) from None

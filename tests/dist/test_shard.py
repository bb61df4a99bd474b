"""Shards put together are the whole, for every role; what does not divide is named."""

import pytest
import torch

from fourfold.core.config import ModelConfig
from fourfold.core.errors import ConfigError
from fourfold.core.parameters import EXPERT_ROLES, ParamSpec, Role, Storage, parameters
from fourfold.core.tensor import QuantScheme, QuantTensor, Weight
from fourfold.dist.comm import Group, SingleComm
from fourfold.dist.shard import SPLITS, Split, check_divides, shard, unshard
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4
from fourfold.weights.geometry import config_json, with_storage

SIZES = (1, 2, 4, 8)
# Small, but with whole blocks, heads, groups and experts for each of eight ranks.
WIDE = {
    "vocab_size": 64,
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 128,
    "o_groups": 8,
    "o_lora_rank": 128,
    "n_routed_experts": 8,
    "moe_intermediate_size": 1024,
    "compress_ratios": [0, 4, 128, 4, 0],
    "num_hash_layers": 1,
}


def config_of(geometry: str, **changes: object) -> ModelConfig:
    data = with_storage(config_json(geometry) | changes, "bfloat16", None, False)
    return ModelConfig.from_dict(data, geometry).config


def specs_by_role(config: ModelConfig) -> dict[Role, ParamSpec]:
    return {spec.role: spec for spec in parameters(config)}


SPECS = specs_by_role(config_of("tiny", **WIDE))


def formats(role: Role) -> list[str]:
    kinds = {
        Storage.LINEAR: ["fp8 e8m0", "fp8 f32"],
        Storage.EXPERT: ["fp8 e8m0", "fp8 f32", "fp4"],
    }
    return ["plain", *kinds.get(role.storage, [])]


def random_weight(spec: ParamSpec, kind: str) -> Weight:
    if kind == "plain":
        if spec.storage is Storage.INTEGER:
            return torch.randint(0, 8, spec.shape)
        return torch.randn(spec.shape)
    scheme: QuantScheme = MXFP4 if kind == "fp4" else FP8_BLOCK
    codes = torch.randint(0, 0x7F, scheme.codes_shape(spec.shape), dtype=torch.uint8)
    shape = scheme.scale_shape(spec.shape)
    if kind == "fp8 f32":
        return QuantTensor(codes, torch.exp2(torch.randint(-9, 9, shape)), scheme, spec.shape)
    scale = torch.randint(110, 140, shape, dtype=torch.uint8)
    return QuantTensor(codes, scale, scheme, spec.shape)


def same(a: Weight, b: Weight) -> bool:
    if isinstance(a, QuantTensor) and isinstance(b, QuantTensor):
        return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)


def values(weight: Weight) -> torch.Tensor:
    return weight.dequantize(torch.float32) if isinstance(weight, QuantTensor) else weight


ROLE_FORMATS = [(role, kind) for role in Role for kind in formats(role)]


def test_every_role_has_a_rule_and_a_parameter() -> None:
    assert set(SPLITS) == set(Role) == set(SPECS)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("role", "kind"), ROLE_FORMATS)
def test_tensor_parallel_shards_make_the_whole(role: Role, kind: str, size: int) -> None:
    spec = SPECS[role]
    whole = random_weight(spec, kind)
    parts = [shard(spec, whole, rank, size, 0, 1) for rank in range(size)]
    assert same(unshard(spec, parts), whole)
    if SPLITS[role] is Split.REPLICATED:
        assert all(same(part, whole) for part in parts)
        return
    dim = (SPLITS[role] is Split.COLUMNS) + (role in EXPERT_ROLES)
    # The cut numbers, too, are the numbers of the whole: codes and scales stayed together.
    assert torch.equal(torch.cat([values(part) for part in parts], dim), values(whole))
    assert {part.shape[dim] for part in parts} == {spec.shape[dim] // size}
    for part in parts:
        tensors = [part.codes, part.scale] if isinstance(part, QuantTensor) else [part]
        assert all(tensor.is_contiguous() for tensor in tensors)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("role", sorted(EXPERT_ROLES, key=lambda role: role.value))
def test_expert_parallel_ranks_hold_whole_experts(role: Role, size: int) -> None:
    spec = SPECS[role]
    for kind in formats(role):
        whole = random_weight(spec, kind)
        # With expert parallelism the tensor-parallel split leaves the routed experts alone.
        parts = [shard(spec, whole, rank % 2, 2, rank, size) for rank in range(size)]
        if size == 1:
            parts = [shard(spec, whole, rank, 2, 0, 1) for rank in range(2)]
        assert same(unshard(spec, parts), whole)
        if size > 1:
            assert all(part.shape[1:] == spec.shape[1:] for part in parts)
            assert torch.equal(values(parts[-1]), values(whole)[-8 // size :])


@pytest.mark.parametrize("role", [role for role in Role if role not in EXPERT_ROLES])
def test_expert_parallelism_concerns_routed_experts_only(role: Role) -> None:
    whole = random_weight(SPECS[role], "plain")
    for rank in range(4):
        assert same(shard(SPECS[role], whole, 0, 1, rank, 4), whole)


def test_sharded_expert_computes_the_same() -> None:
    up = random_weight(SPECS[Role.SHARED_W1], "fp8 f32")
    down = random_weight(SPECS[Role.SHARED_W2], "fp8 f32")
    x = torch.randn(3, 160, dtype=torch.float64)

    def run(w1: Weight, w2: Weight) -> torch.Tensor:
        return (x @ values(w1).double().T).relu() @ values(w2).double().T

    partial = [
        run(
            shard(SPECS[Role.SHARED_W1], up, rank, 4, 0, 1),
            shard(SPECS[Role.SHARED_W2], down, rank, 4, 0, 1),
        )
        for rank in range(4)
    ]
    assert torch.allclose(torch.stack(partial).sum(0), run(up, down), rtol=1e-12)


@pytest.mark.parametrize(
    ("role", "shape", "kind", "size", "words"),
    [
        (Role.EXPERT_W1, (1, 3072, 32), "fp8 e8m0", 16, "a 3,072-wide expert over 16 ranks is 192"),
        (Role.EXPERT_W2, (1, 8, 96), "fp4", 2, "a 96-wide expert over 2 ranks is 48"),
        (Role.SHARED_W2, (32, 256), "fp8 f32", 4, "256-wide shared expert over 4 ranks is 64"),
        (Role.WQ_B, (512, 96), "fp8 e8m0", 8, "wq_b with 512 rows over 8 ranks is 64"),
        (Role.WO_B, (96, 384), "fp8 e8m0", 2, "wo_b with 384 columns over 2 ranks is 192"),
        (Role.EMBED, (101, 8), "plain", 2, "embed with 101 rows over 2 ranks does not divide"),
        (Role.ATTN_SINK, (6,), "plain", 4, "attn_sink with 6 rows over 4 ranks does not divide"),
    ],
)  # fmt: skip
def test_a_cut_through_a_block_is_refused_by_name(
    role: Role, shape: tuple[int, ...], kind: str, size: int, words: str
) -> None:
    spec = ParamSpec(role, "", shape)
    with pytest.raises(ConfigError) as error:
        shard(spec, random_weight(spec, kind), 0, size, 0, 1)
    assert str(error.value).startswith(f"{role.value} cannot be split: ")
    assert words in str(error.value)


def test_experts_that_do_not_divide_are_refused() -> None:
    spec = ParamSpec(Role.EXPERT_W1, "", (6, 32, 32))
    with pytest.raises(ConfigError, match="6 experts over 4 ranks does not divide"):
        shard(spec, torch.zeros(spec.shape), 0, 1, 0, 4)


def test_wrong_shapes_and_ranks_are_defects() -> None:
    spec = SPECS[Role.WQ_A]
    with pytest.raises(ValueError, match="must be"):
        shard(spec, torch.zeros(3, 3), 0, 1, 0, 1)
    with pytest.raises(ValueError, match="tp_rank"):
        shard(spec, torch.zeros(spec.shape), 2, 2, 0, 1)
    with pytest.raises(ValueError, match="copies differ"):
        unshard(spec, [torch.zeros(spec.shape), torch.ones(spec.shape)])
    with pytest.raises(ValueError, match="parts of"):
        unshard(SPECS[Role.WO_B], [torch.zeros(160, 128)] * 3)


# ---- whole configurations


def schemes(experts: QuantScheme | None, linear: QuantScheme | None) -> dict[Role, QuantScheme]:
    kinds = {Storage.LINEAR: linear, Storage.EXPERT: experts}
    found = {role: kinds.get(role.storage) for role in Role}
    return {role: scheme for role, scheme in found.items() if scheme is not None}


@pytest.mark.parametrize("geometry", ["flash", "pro"])
@pytest.mark.parametrize("experts", [MXFP4, FP8_BLOCK, None])
def test_released_models_split_over_up_to_eight_ranks(
    geometry: str, experts: QuantScheme | None
) -> None:
    config = config_of(geometry)
    linear = None if experts is None else FP8_BLOCK
    for tp in SIZES:
        for ep in SIZES:
            assert check_divides(config, tp, ep, schemes(experts, linear)) == []


def test_pro_over_sixteen_ranks_names_the_expert() -> None:
    config = config_of("pro")
    faults = check_divides(config, 16, 1, schemes(FP8_BLOCK, FP8_BLOCK))
    assert faults == [
        "a 3,072-wide expert over 16 ranks is 192, not a multiple of 128 (fp8_block)",
        "a 3,072-wide shared expert over 16 ranks is 192, not a multiple of 128 (fp8_block)",
    ]
    assert check_divides(config, 16, 16, schemes(FP8_BLOCK, None)) == []
    # An FP4 group is 32 inputs of a row, so 192 is fine for the routed experts.
    assert check_divides(config, 16, 1, schemes(MXFP4, None)) == []


def test_flash_over_sixteen_ranks_names_the_groups() -> None:
    faults = check_divides(config_of("flash"), 16, 1, schemes(MXFP4, FP8_BLOCK))
    assert faults == ["o_groups 8 does not divide over 16 tensor-parallel ranks"]


def test_everything_in_the_way_is_listed_once() -> None:
    faults = check_divides(config_of("tiny"), 3, 5, {})
    assert faults == [
        "num_attention_heads 8 does not divide over 3 tensor-parallel ranks",
        "o_groups 4 does not divide over 3 tensor-parallel ranks",
        "vocab_size 640 does not divide over 3 tensor-parallel ranks",
        "n_routed_experts 8 does not divide over 5 expert-parallel ranks",
        "a 256-wide shared expert over 3 ranks does not divide",
    ]


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("ep", SIZES)
def test_a_config_that_divides_can_be_sharded_whole(tp: int, ep: int) -> None:
    """`check_divides` and `shard` agree about every parameter of a small FP4 and FP8 model."""
    config = config_of("tiny")
    found = schemes(MXFP4, FP8_BLOCK)
    faults = check_divides(config, tp, ep, found)
    refused = []
    for spec in specs_by_role(config).values():
        kind = {MXFP4: "fp4", FP8_BLOCK: "fp8 e8m0", None: "plain"}[found.get(spec.role)]
        try:
            shard(spec, random_weight(spec, kind), tp - 1, tp, ep - 1, ep)
        except ConfigError as error:
            refused.append(str(error).split(": ")[1])
    assert set(refused) <= set(faults) or config.o_groups % tp
    assert bool(faults) == (tp > 2)


def test_one_rank_communicates_with_nobody() -> None:
    comm = SingleComm()
    x = torch.randn(2, 3)
    for group in Group:
        assert comm.all_reduce(x, group) is x
        assert comm.all_gather(x, 1, group) is x
        assert (comm.rank(group), comm.size(group)) == (0, 1)
    assert comm.all_reduce(x) is x
    assert comm.all_gather(x, dim=0) is x

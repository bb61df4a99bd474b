"""Which tensors a checkpoint has, in which files, at which offsets: from the config alone.

Contract: `checkpoint_layout` is a pure function of the inventory (core/parameters.py) and a
`WeightFormat`; its counts and byte totals are those of the released checkpoints. One file for the
embedding, one for each layer, one for the tail, one for each MTP layer; no tensor spans files. It
reads and writes nothing and draws no numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fourfold.core.config import ModelConfig
from fourfold.core.errors import ConfigError
from fourfold.core.parameters import ParamSpec, Role, Storage, parameters, scale_name
from fourfold.core.tensor import QuantScheme
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4
from fourfold.weights.names import Part
from fourfold.weights.safetensors_writer import Entry, FileLayout, arrange


@dataclass(frozen=True)
class WeightFormat:
    """How a checkpoint stores its weights.

    `model_dtype` (a safetensors dtype) holds embedding, head, norms, compressors, router and every
    matrix that is not quantised; `linear` and `expert` are the schemes of quantisable linears and
    routed experts; `scale_dtype` is that of FP8 scales (FP4's are always F8_E8M0). Roles in `plain`
    are stored unquantised although their kind is quantised.
    """

    model_dtype: str = "BF16"
    linear: QuantScheme | None = None
    expert: QuantScheme | None = None
    scale_dtype: str = "F8_E8M0"
    plain: frozenset[Role] = frozenset()

    def scheme(self, role: Role) -> QuantScheme | None:
        """The scheme of a role's matrices, or None where they are plain."""
        if role in self.plain:
            return None
        return {Storage.LINEAR: self.linear, Storage.EXPERT: self.expert}.get(role.storage)

    @property
    def torch_dtype(self) -> str:
        """What config.json calls the model dtype."""
        return {"BF16": "bfloat16", "F32": "float32"}[self.model_dtype]

    @property
    def expert_dtype(self) -> str | None:
        """What config.json says of the routed experts; nothing if they are plain."""
        if self.expert is None:
            return None
        return "fp4" if self.expert is MXFP4 else "fp8"

    @property
    def quantised(self) -> bool:
        """Whether config.json needs a quantisation config."""
        return self.linear is not None or self.expert is not None


FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {
        "native": WeightFormat(linear=FP8_BLOCK, expert=MXFP4),
        "fp8": WeightFormat(linear=FP8_BLOCK, expert=FP8_BLOCK, scale_dtype="F32"),
        "bf16": WeightFormat(),
        "float32": WeightFormat(model_dtype="F32"),
    }
)
"""`native`: Flash and Pro. `fp8`: the Bases. The other two are unquantised."""


@dataclass(frozen=True, slots=True)
class StoredTensor(Entry):
    """A checkpoint tensor and what it is: a weight of `spec` (one expert's, for routed experts) or
    the scale of one, in `scheme` (None: plain). `content` is the name its values are drawn from."""

    spec: ParamSpec
    part: Part
    scheme: QuantScheme | None
    content: str


@dataclass(frozen=True)
class CheckpointLayout:
    """The safetensors files of a checkpoint, by name in order."""

    files: Mapping[str, FileLayout[StoredTensor]]

    @property
    def total_size(self) -> int:
        """Bytes of all tensors, the index file's `metadata.total_size`."""
        return sum(layout.payload_bytes for layout in self.files.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(layout.file_bytes for layout in self.files.values())

    def tensors(self) -> Iterator[StoredTensor]:
        """Every tensor, file by file."""
        for layout in self.files.values():
            yield from layout.entries

    def weight_map(self) -> dict[str, str]:
        """Tensor name to file name, sorted by tensor name."""
        named = {e.name: file for file, layout in self.files.items() for e in layout.entries}
        return dict(sorted(named.items()))


def checkpoint_layout(
    config: ModelConfig, weights: WeightFormat, mtp_duplicates: bool = False
) -> CheckpointLayout:
    """The files of a checkpoint of `config` with weights stored as `weights`.

    `mtp_duplicates` adds the copies of embedding and head that the Bases carry under `mtp.0.`.
    Raises `ConfigError` where a scheme cannot store a matrix of this size.
    """
    groups: dict[str, list[StoredTensor]] = {}
    for spec in parameters(config):
        groups.setdefault(_group(spec), []).extend(_stored(spec, weights))
    if mtp_duplicates and config.num_nextn_predict_layers:
        shape = (config.vocab_size, config.hidden_size)
        for name, role in (("emb.tok_emb.weight", Role.EMBED), ("head.weight", Role.HEAD)):
            spec = ParamSpec(role, "", shape)
            copy = StoredTensor(
                f"mtp.0.{name}", weights.model_dtype, shape, spec, Part.WEIGHT, None, spec.name
            )
            groups["mtp.0."].append(copy)
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    files = {name: arrange(group) for name, group in zip(names, groups.values(), strict=True)}
    return CheckpointLayout(MappingProxyType(files))


def _group(spec: ParamSpec) -> str:
    """Tensors with the same answer share a file; `parameters` yields the groups in file order."""
    return "embed" if spec.role is Role.EMBED else spec.prefix or "tail"


def _stored(spec: ParamSpec, weights: WeightFormat) -> Iterator[StoredTensor]:
    """The checkpoint tensors of one logical parameter."""
    scheme = weights.scheme(spec.role)
    shape = spec.checkpoint_shape
    if scheme is None:
        dtype = weights.model_dtype
        if spec.storage in (Storage.FLOAT, Storage.INTEGER):
            dtype = "F32" if spec.storage is Storage.FLOAT else "I64"
        for name in spec.checkpoint_names:
            yield StoredTensor(name, dtype, shape, spec, Part.WEIGHT, None, name)
        return
    if scheme is MXFP4 and shape[-1] % MXFP4.block[1]:
        raise ConfigError(
            f"{spec.name}: FP4 needs a multiple of {MXFP4.block[1]} inputs, found {shape[-1]}"
        )
    dtype, scale_dtype = ("I8", "F8_E8M0") if scheme is MXFP4 else ("F8_E4M3", weights.scale_dtype)
    codes, scales = scheme.codes_shape(shape), scheme.scale_shape(shape)
    for name in spec.checkpoint_names:
        yield StoredTensor(name, dtype, codes, spec, Part.WEIGHT, scheme, name)
        scale = scale_name(name)
        yield StoredTensor(scale, scale_dtype, scales, spec, Part.SCALE, scheme, scale)

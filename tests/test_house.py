"""The rules of docs/HOUSE.md that a machine can check, over the syntax tree of every file.

Standard library only. The second half feeds the checker one small violation of each rule, because a
checker that finds nothing proves nothing.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The files of core that may import torch; no other file there does, directly or through these.
TORCH_CORE = {"device", "tensor", "rows", "batch", "state"}
# What the front may see of core.
FRONT = {f"core.{name}" for name in ("request", "client", "config", "errors", "log", "env")}
ENGINE_ROOM = {"torch", "triton", "numpy", "safetensors", "tokenizers", "huggingface_hub"}
FLOOR_2 = {"core", "ops", "quant", "dist"}
SERVING = {"starlette", "uvicorn", "msgspec", "prometheus_client"}
ROOF = FLOOR_2 | {"model", "cache", "weights", "engine", "text", "server"}
# Files that may import one package more than their part.
EXTRA = {
    "fourfold/engine/wire.py": {"msgspec"},
    "fourfold/text/grammar_mask.py": {"llguidance", "numpy"},
    "fourfold/text/token_mask.py": {"numpy"},
    "fourfold/cli/config_file.py": {"yaml"},
}
# Part of fourfold -> (parts it may import, packages it may import beside the standard library).
# A part is a folder or file of fourfold/; "core.x" allows that one file.
HOUSE: dict[str, tuple[set[str], set[str]]] = {
    "core": ({"core"}, ENGINE_ROOM),
    "ops": ({"core", "ops"}, ENGINE_ROOM),
    "kernels": ({"core", "ops", "kernels"}, ENGINE_ROOM),
    "quant": ({"core", "ops", "quant"}, ENGINE_ROOM),
    "dist": ({"core", "ops", "dist"}, ENGINE_ROOM),
    "model": (FLOOR_2 | {"model"}, ENGINE_ROOM),
    "cache": (FLOOR_2 | {"cache"}, ENGINE_ROOM),
    "weights": (FLOOR_2 | {"weights"}, ENGINE_ROOM),
    "engine": (FLOOR_2 | {"kernels", "model", "cache", "weights", "engine"}, ENGINE_ROOM),
    "text": (FRONT | {"text"}, {"tokenizers"}),
    "server": (FRONT | {"text", "server"}, SERVING),
    "cli": (ROOF | {"llm", "cli"}, ENGINE_ROOM | {"click", "tqdm"}),
    "llm": (ROOF | {"llm"}, ENGINE_ROOM | {"tqdm"}),
    "assets": (set(), set()),  # a checkpoint's files, nothing that is imported
    "__main__": ({"cli"}, set()),
    "__init__": ({"llm", "core.request", "core.errors"}, set()),
}
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
BANNED_CALLS = {"eval", "exec", "__import__", "torch.load", "torch.compile"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv"}
ENVIRONMENT_READERS = {"fourfold/core/env.py", "fourfold/weights/hub.py"}
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MAKERS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}
MUTATORS = {"append", "add", "update", "setdefault", "pop", "popitem", "clear", "extend", "insert"}
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*|__\w+__")
# The model knows neither vendors nor architectures nor storage formats.
MODEL_WORDS = re.compile(
    r"(^|_)(cuda|nvidia|hopper|blackwell|sm\d+|rocm|hip|amd|gfx\w*|cdna\d?|triton|"
    r"mxfp4|nvfp4|fp4|fp8|e8m0|e4m3|float8\w*|bf16|bfloat16)(_|$)",
    re.IGNORECASE,
)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain on a plain name, else an empty string."""
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return node.id if isinstance(node, ast.Name) else ""


def imported(node: ast.AST, package: list[str]) -> Iterator[tuple[str, str | None]]:
    """(module, name taken from it) of an import, `import_module("x")` included; `.` resolved."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, None) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join([*base, *filter(None, [node.module])])
        yield from ((module, alias.name) for alias in node.names)
    elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module") and node.args:
        literal = node.args[0]
        if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
            yield literal.value, None


def import_faults(module: str, name: str | None, path: Path, inside: bool) -> Iterator[str]:
    """What is wrong with the file `path` importing `module` (or `name` from it)."""
    part = path.parts[1].removesuffix(".py")
    stem = path.stem
    parts, packages = HOUSE.get(part, (set(), set()))
    packages = packages | EXTRA.get(path.as_posix(), set())
    torch_free = part == "core" and stem not in TORCH_CORE
    top, *rest = module.split(".")
    if top == "fourfold":
        rest += [name] if name else []
        if not rest or rest[0] not in HOUSE:
            return  # an attribute of fourfold itself, such as __version__
        allowed = rest[0] in parts or ".".join(rest[:2]) in parts
        if not allowed:
            yield f"{part} must not import {'.'.join(rest)}"
        if torch_free and rest[1:2] and rest[1] in TORCH_CORE:
            yield f"{stem} is torch-free and must not import {'.'.join(rest)}"
    elif top in PICKLES:
        yield f"imports {top}"
    elif top not in sys.stdlib_module_names and (
        top not in packages or (top, torch_free) == ("torch", True)
    ):
        yield f"{part}/{stem} must not import {top}"
    elif top == "triton" and part != "kernels" and not inside:
        yield "triton is imported at module level outside kernels: a CPU has none"
    elif f"{module}.{name}" in ENVIRONMENT and path.as_posix() not in ENVIRONMENT_READERS:
        yield "reads the environment"


def swallows(handler: ast.ExceptHandler) -> bool:
    """A handler that catches everything and says nothing (a bare one always counts)."""
    broad = {"Exception", "BaseException"}
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    if handler.type is None:
        return True
    silent = all(
        isinstance(line, ast.Pass | ast.Continue)
        or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for line in handler.body
    )
    return silent and any(dotted(kind) in broad for kind in types if kind)


def code_faults(node: ast.AST, path: Path) -> Iterator[str]:
    """What is wrong with one node, wherever it stands."""
    if isinstance(node, ast.ExceptHandler) and swallows(node):
        yield "swallows every exception"
    elif isinstance(node, ast.Global):
        yield f"global {', '.join(node.names)}: module state"
    elif isinstance(node, ast.Call):
        name = dotted(node.func)
        if name in BANNED_CALLS:
            yield f"calls {name}"
        if name.endswith("suppress") and {"Exception", "BaseException"} & {*map(dotted, node.args)}:
            yield "swallows every exception"
        if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
            yield "allow_pickle"
        owner, _, method = name.rpartition(".")
        if method in MUTATORS and CONSTANT.fullmatch(owner):
            yield f"changes the constant {owner}"
    elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        if CONSTANT.fullmatch(dotted(node.value)):
            yield f"changes the constant {dotted(node.value)}"
    elif dotted(node) in ENVIRONMENT and path.as_posix() not in ENVIRONMENT_READERS:
        yield "reads the environment"
    if path.parts[1] == "model":
        word = (
            getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
        )
        if isinstance(word, str) and MODEL_WORDS.search(word):
            yield f"model/ says {word!r}: that belongs in ops, quant or kernels"


def state_faults(node: ast.AST) -> Iterator[str]:
    """What is wrong with one statement at module level: mutable values that are no constants."""
    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
        return
    value = node.value
    maker = isinstance(value, ast.Call) and dotted(value.func).rpartition(".")[2] in MAKERS
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        if (maker or isinstance(value, MUTABLE)) and not CONSTANT.fullmatch(dotted(target)):
            yield f"mutable module state {dotted(target)!r}"


def violations(source: str, path: str) -> list[str]:
    """Every broken rule in a file of fourfold/, as `path:line: what`."""
    where = Path(path)
    tree = ast.parse(source, path)
    package = [part.removesuffix(".py") for part in where.parts[:-1]]
    scopes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(inner) for scope in scopes for inner in ast.walk(scope) if inner is not scope}
    classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    in_class = {id(inner) for scope in classes for inner in ast.walk(scope) if inner is not scope}
    nested = inside | in_class
    found = []
    if where.parts[1].removesuffix(".py") not in HOUSE:
        found.append(f"{path}:1: not a part of the house; docs/HOUSE.md names them")
    for node in ast.walk(tree):
        faults = [*code_faults(node, where)]
        for module, name in imported(node, package):
            faults += import_faults(module, name, where, id(node) in inside)
        if id(node) not in nested:
            faults += state_faults(node)
        found += [f"{path}:{getattr(node, 'lineno', 1)}: {fault}" for fault in faults]
    return found


def sources() -> list[Path]:
    """Every Python file of the package."""
    return sorted((ROOT / "fourfold").rglob("*.py"))


def test_the_house_stands() -> None:
    found = [
        fault
        for file in sources()
        for fault in violations(file.read_text("utf-8"), file.relative_to(ROOT).as_posix())
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("core/config.py", "import torch", "must not import torch"),
        ("core/config.py", "def f():\n    import torch", "must not import torch"),
        ("core/config.py", "from fourfold.core import tensor", "must not import core.tensor"),
        ("core/config.py", "from .tensor import QuantTensor", "must not import core.tensor"),
        ("core/__init__.py", "from fourfold.core.device import Device", "must not import core.dev"),
        ("core/device.py", "from fourfold.ops import norm", "core must not import ops"),
        ("core/device.py", "import triton", "triton is imported at module level"),
        ("ops/norm.py", "import fourfold.kernels", "ops must not import kernels"),
        ("ops/norm.py", "from ..quant.resolve import x", "ops must not import quant"),
        ("ops/norm.py", "from .. import model", "ops must not import model"),
        ("ops/norm.py", "import scipy.special", "must not import scipy"),
        ("ops/norm.py", "import importlib\nimportlib.import_module('scipy')", "import scipy"),
        ("quant/fp8.py", "import fourfold.dist.comm", "quant must not import dist"),
        ("dist/comm.py", "from fourfold import quant", "dist must not import quant"),
        ("model/v4.py", "from fourfold.cache.state import Slot", "model must not import cache"),
        ("model/v4.py", "from fourfold import weights", "model must not import weights"),
        ("model/v4.py", "x = device.type == cuda_name", "model/ says 'cuda_name'"),
        ("model/v4.py", "y = x.to(torch.bfloat16)", "model/ says 'bfloat16'"),
        ("cache/pool.py", "from fourfold.model.v4 import Model", "cache must not import model"),
        ("weights/loader.py", "import fourfold.model", "weights must not import model"),
        ("weights/loader.py", "import tqdm", "must not import tqdm"),
        ("weights/loader.py", "import os\nx = os.environ['HOME']", "reads the environment"),
        ("weights/loader.py", "from os import getenv", "reads the environment"),
        ("engine/engine.py", "from fourfold.server import app", "engine must not import server"),
        ("engine/engine.py", "from fourfold.cli import main", "engine must not import cli"),
        ("engine/engine.py", "from fourfold.llm import LLM", "engine must not import llm"),
        ("engine/client.py", "import msgspec", "must not import msgspec"),
        ("text/chat.py", "import torch", "must not import torch"),
        ("text/chat.py", "from fourfold.core.tensor import Q", "text must not import core.tensor"),
        ("text/chat.py", "from fourfold.core import batch", "text must not import core.batch"),
        ("server/app.py", "import torch", "must not import torch"),
        ("server/app.py", "from fourfold.engine import x", "server must not import engine"),
        ("cli/main.py", "from fourfold import kernels", "cli must not import kernels"),
        ("__init__.py", "import torch", "must not import torch"),
        ("__init__.py", "from fourfold.engine import engine", "__init__ must not import engine"),
        ("utils/misc.py", "", "not a part of the house"),
        ("ops/norm.py", "import pickle", "imports pickle"),
        ("ops/norm.py", "torch.load('x')", "calls torch.load"),
        ("ops/norm.py", "f = torch.compile(f)", "calls torch.compile"),
        ("ops/norm.py", "np.load(f, allow_pickle=True)", "allow_pickle"),
        ("ops/norm.py", "eval('1')", "calls eval"),
        ("ops/norm.py", "def f():\n    exec('1')", "calls exec"),
        ("ops/norm.py", "__import__('x')", "calls __import__"),
        ("ops/norm.py", "try:\n    f()\nexcept:\n    raise", "swallows every exception"),
        ("ops/norm.py", "try:\n    f()\nexcept Exception:\n    pass", "swallows every exception"),
        ("ops/norm.py", "try:\n    f()\nexcept (A, Exception):\n    ...", "swallows every exc"),
        ("ops/norm.py", "with contextlib.suppress(Exception):\n    f()", "swallows every exc"),
        ("ops/norm.py", "cache = {}", "mutable module state 'cache'"),
        ("ops/norm.py", "seen: set[int] = set()", "mutable module state 'seen'"),
        ("ops/norm.py", "if x:\n    rows = [1]", "mutable module state 'rows'"),
        ("ops/norm.py", "OPS = {}\ndef f():\n    OPS['a'] = 1", "changes the constant OPS"),
        ("ops/norm.py", "OPS = []\ndef f():\n    OPS.append(1)", "changes the constant OPS"),
        ("ops/norm.py", "def f():\n    global x\n    x = 1", "global x"),
    ],
)
def test_each_rule_is_seen_broken(path: str, source: str, expected: str) -> None:
    found = violations(source, f"fourfold/{path}")
    assert any(expected in fault for fault in found), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/config.py", "import json\nfrom fourfold.core.errors import ConfigError"),
        ("core/env.py", "import os\nx = os.environ"),
        ("core/tensor.py", "import torch\nfrom .errors import ConfigError"),
        ("ops/norm.py", "from fourfold.ops.registry import Op\nTABLE = {1: 2}\n__all__ = ['f']"),
        ("ops/norm.py", "def f():\n    rows = []\n    rows.append(1)\n    import triton"),
        ("ops/norm.py", "model.eval()\nre.compile('x')"),
        ("ops/norm.py", "try:\n    f()\nexcept KeyError:\n    pass"),
        ("kernels/triton/norm.py", "import triton\nfrom fourfold.ops.norm import rms_norm"),
        ("engine/engine.py", "from fourfold import kernels\nfrom fourfold.model import v4"),
        (
            "server/app.py",
            "from fourfold.core import client, errors\nfrom fourfold.text import chat",
        ),
        ("cli/main.py", "import click\nfrom fourfold import __version__\nimport fourfold.engine"),
        (
            "llm.py",
            "import tqdm\nfrom fourfold.engine import client\nfrom fourfold.text import chat",
        ),
        ("engine/wire.py", "import msgspec"),
        ("model/v4.py", "from fourfold.ops import norm\nx = q_lora_rank.float()"),
    ],
)
def test_what_the_rules_allow(path: str, source: str) -> None:
    assert violations(source, f"fourfold/{path}") == []


def test_torch_stays_out_of_the_front_and_of_start_up() -> None:
    names = ["fourfold"]
    for file in sources():
        module = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        front = module.startswith(("fourfold.text", "fourfold.server", "fourfold.core"))
        if front and module.removeprefix("fourfold.core.") not in TORCH_CORE:
            names.append(module.removesuffix(".__init__"))
    code = f"import {', '.join(names)}, sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, f"{code}\n{done.stderr.decode()}"


def test_the_project_speaks_of_itself_alone() -> None:
    """No file names a path of somebody's machine or the host of a package registry."""
    words = [
        *("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", ".libr" + "ary", "shared" + "/spec"),
        *("py" + "pi.org", "pythonho" + "sted", "download.py" + "torch", "registry.np" + "mjs"),
    ]
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listing.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        file = ROOT / name
        data = file.read_bytes() if file.is_file() else b"\0"
        if b"\0" in data:
            continue  # a binary file, or one deleted but not yet committed
        lines = enumerate(data.decode("utf-8").splitlines(), 1)
        found += [f"{name}:{i}: {w}" for i, line in lines for w in words if w in line]
    assert not found, "\n" + "\n".join(found)

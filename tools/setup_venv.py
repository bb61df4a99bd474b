"""Make the project's virtual environment, one visible step after another.

Contract: run by the Makefile with the interpreter the environment is to be built from; needs only
the standard library. Every choice is recorded in the ready file, so a later run that changes
nothing returns at once, and one that names no choice keeps those made before. With --system-torch
the torch and triton of that interpreter are used where they lie: they are never handed to pip, and
their version and place are compared before and after. Knows no package registry: pip is used as it
is configured.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Never handed to pip in a step other than torch's own, under any name they are published under.
TORCH_FAMILY = ("torch", "triton", "pytorch-triton", "pytorch-triton-rocm")

PROBE = """
import importlib.metadata as metadata, importlib.util as util, json
def found(name):
    spec = util.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    names = metadata.packages_distributions().get(name) or [name]
    try:
        return {"file": spec.origin, "version": metadata.version(names[0])}
    except metadata.PackageNotFoundError:
        return {"file": spec.origin, "version": __import__(name).__version__}
print(json.dumps({name: found(name) for name in ("torch", "triton")}))
"""

REPORT = """
import platform, fourfold, torch
hip, cuda = torch.version.hip, torch.version.cuda
built = f"ROCm {hip}" if hip else f"CUDA {cuda}" if cuda else "CPU only"
print(f"ready: fourfold {fourfold.__version__}, Python {platform.python_version()}, "
      f"torch {torch.__version__} ({built})")
"""


def fail(text):
    """Leave with one readable sentence."""
    sys.exit(f"setup: {text}")


def step(number, text):
    """Announce a step."""
    print(f"[{number}/5] {text}", flush=True)


def run(command, what):
    """Run `command` with its output visible; a failure names the step."""
    code = subprocess.run([str(part) for part in command], check=False).returncode
    if code:
        fail(f"{what} failed (exit status {code}); the lines above say why")


def pip(python, *arguments):
    """Run pip inside the environment, showing its progress."""
    run([python, "-m", "pip", "install", "--disable-pip-version-check", *arguments], "pip")


def probe(python):
    """Version and file of torch and triton as `python` sees them (None where absent)."""
    # -P keeps the working directory off sys.path: a folder here must not pass for an installation.
    done = subprocess.run(
        [str(python), "-P", "-c", PROBE], capture_output=True, text=True, check=False
    )
    if done.returncode:
        fail(f"{python} cannot tell its packages:\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def name_of(requirement):
    """The normalised package name of a requirement such as `torch>=2.11`."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement).group()
    return re.sub(r"[-_.]+", "-", name).lower()


def parse_choices():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--ready", type=Path, required=True, help="stamp and record of the choices")
    parser.add_argument(
        "--extras",
        default="",
        help="comma-separated extras of pyproject.toml; those of before stay",
    )
    parser.add_argument(
        "--torch", required=True, help="requirement installed without --system-torch"
    )
    parser.add_argument("--system-torch", default="", help="1 to use this interpreter's torch")
    parser.add_argument("--named", default="", help="which Make variables the user named this time")
    return parser.parse_args()


def read_project(extras, record):
    """pyproject.toml's requirements, with `extras` and those recorded, and everything an installation
    depends on."""
    import tomllib  # not there before 3.11, and the version check must be able to speak first

    table = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    project = table["project"]
    requirements = list(project["dependencies"])
    optional = project["optional-dependencies"]
    before = record.get("project", {}).get("extras", [])
    chosen = {*filter(None, extras.split(",")), *(each for each in before if each in optional)}
    for extra in sorted(chosen):
        requirements += optional[extra]
    return requirements, {
        "project": project,
        "build": table["build-system"],
        "extras": sorted(chosen),
    }


def read_record(path):
    """The choices of an earlier run, or {}: an unreadable record means starting over."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def has_module(python, name):
    """Whether `python` can import the module `name`."""
    done = subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False)
    return done.returncode == 0


def create(venv, base, system):
    """Create the environment from the interpreter `base`, with pip inside."""
    if venv.exists():
        shutil.rmtree(venv)
    command = [base, "-m", "venv", *(["--system-site-packages"] if system else [])]
    if has_module(base, "ensurepip"):
        run([*command, venv], "creating the environment")
    elif has_module(base, "pip"):
        run([*command, "--without-pip", venv], "creating the environment")
        target = venv / "bin" / "python"
        run([base, "-m", "pip", "--python", target, "install", "--ignore-installed", "pip"], "pip")
    else:
        fail(f"{base} has neither ensurepip nor pip (on Debian: apt-get install python3-venv)")


def share_parent(venv, base, wanted):
    """If `base` is itself a virtual environment, make its packages visible in ours.

    `--system-site-packages` reaches only the interpreter underneath `base`; a path file adds the
    rest.
    """
    python = venv / "bin" / "python"
    if probe(python) == wanted:
        return
    ask = "import json, sysconfig; print(json.dumps(sysconfig.get_paths()))"
    paths = [
        json.loads(subprocess.run([str(p), "-c", ask], capture_output=True, check=True).stdout)
        for p in (base, python)
    ]
    lines = sorted({paths[0]["purelib"], paths[0]["platlib"]})
    Path(paths[1]["purelib"], "system_torch.pth").write_text("\n".join(lines) + "\n")
    if probe(python) != wanted:
        fail(f"{base}'s torch ({wanted['torch']['file']}) cannot be seen from {venv}")


def require_torch(found, base, minimum):
    """Refuse a missing or too old torch; a vendor's pre-release of `minimum` counts as it."""
    if found["torch"] is None:
        fail(f"SYSTEM_TORCH=1, but {base} has no torch; name the right one with PYTHON=…")
    release = [int(part) for part in re.findall(r"\d+", found["torch"]["version"])[:2]]
    if release < [int(part) for part in re.findall(r"\d+", minimum)[:2]]:
        fail(f"{base} has torch {found['torch']['version']}; fourfold needs {minimum}")


def install(venv, requirements, torch, wanted):
    """Steps 2 to 4: torch (unless kept), the other packages, fourfold itself."""
    python = venv / "bin" / "python"
    if wanted is None:
        step(2, f"{torch} (the largest: a CPU build is about 200 MB, a GPU build several GB)")
        pip(python, torch)
    else:
        step(2, f"keeping torch {wanted['torch']['version']} in {wanted['torch']['file']}")
    before = probe(python)
    # A package that drags in another torch must fail here and not win.
    pins = [f"{name}=={found['version']}\n" for name, found in before.items() if found]
    constraints = venv / "constraints.txt"
    constraints.write_text("".join(pins))
    # A kept torch brings its own triton or does without; ours gets one for compiling kernels.
    kept = TORCH_FAMILY if wanted else ("torch", *filter(before.get, TORCH_FAMILY))
    rest = [text for text in requirements if name_of(text) not in kept]
    step(3, "packages: " + ", ".join(rest))
    pip(python, "-c", constraints, *rest)
    step(4, "fourfold itself, editable")
    pip(python, "--no-deps", "-e", ".")
    after = probe(python)
    if any(found and after[name] != found for name, found in before.items()):
        fail(f"torch or triton changed while installing: before {before}, after {after}")


def main():
    """Bring the environment up to date, or return at once when it is."""
    if sys.version_info < (3, 11):
        fail(f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}")
    args = parse_choices()
    record = read_record(args.ready)
    requirements, project = read_project(args.extras, record)
    choices = {
        "PYTHON": sys.executable,
        "TORCH": args.torch,
        "SYSTEM_TORCH": args.system_torch == "1",
    }
    for name, value in record.get("choices", {}).items():
        if name not in args.named.split():
            choices[name] = value
    now = {"choices": choices, "project": project}
    python = args.venv / "bin" / "python"
    if now == record and python.exists():
        args.ready.touch()
        return
    base, system = choices["PYTHON"], choices["SYSTEM_TORCH"]
    wanted = probe(base) if system else None
    if wanted is not None:
        require_torch(wanted, base, next(r for r in requirements if name_of(r) == "torch"))
    old = record.get("choices", {})
    if python.exists() and (old.get("PYTHON"), old.get("SYSTEM_TORCH")) == (base, system):
        step(1, f"keeping {args.venv}")
    else:
        step(1, f"{args.venv} from {base}")
        create(args.venv, base, system)
        if wanted is not None:
            share_parent(args.venv, base, wanted)
    install(args.venv, requirements, choices["TORCH"], wanted)
    step(5, "first import of torch")
    run([python, "-c", REPORT], "importing fourfold and torch")
    args.ready.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

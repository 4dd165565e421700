"""Imports go one way: run.py, scripts → lra → attention → kernels; the lower two need only torch and Triton."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {"kernels": 0, "attention": 1, "lra": 2, "scripts": 3, "run": 4}
FILES = [path for layer in LAYERS for path in [*ROOT.glob(f"{layer}.py"), *ROOT.glob(f"{layer}/**/*.py")]]
LIGHT = {"torch", "triton"}


def imported(path: Path, source: str | None = None) -> set[str]:
    """Absolute dotted names of all that a file imports, at any depth; `from a import b` counts as a and a.b."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(source or path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            anchor = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*anchor, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def violations(path: Path, source: str | None = None) -> list[str]:
    """What `path` imports against the rules, each as one line."""
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    wrong = []
    for name in sorted(imported(path, source)):
        top = name.split(".")[0]
        if LAYERS.get(top, -1) > LAYERS[layer]:
            wrong.append(f"{layer} imports {name}, which is above it")
        elif layer in ("kernels", "attention") and top not in LAYERS and top not in LIGHT | sys.stdlib_module_names:
            wrong.append(f"{layer} imports {name}, but needs only torch and Triton")
        if path.name.startswith("triton") and any(part.startswith("reference") for part in name.split(".")):
            wrong.append(f"a Triton file imports the reference {name}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path):
    assert violations(path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/mra/api.py", "from attention.base import Attention"),
        ("kernels/mra/api.py", "def f():\n    import numpy.random"),
        ("kernels/mra/triton.py", "from . import reference"),
        ("kernels/mra/triton.py", "from kernels.mra.reference import mra_reference"),
        ("kernels/mra/triton_backward.py", "from ..lln import reference"),
        ("attention/mra.py", "import lra"),
        ("attention/mra.py", "from omegaconf import DictConfig"),
        ("lra/model.py", "import scripts.report"),
        ("scripts/report.py", "from run import main"),
    ],
)
def test_a_wrong_import_is_seen(path: str, source: str):
    assert len(violations(ROOT / path, source)) > 0


def test_right_imports_pass():
    assert violations(ROOT / "kernels/mra/triton.py", "import triton\nfrom ..common import layout\nimport math") == []
    assert violations(ROOT / "lra/model.py", "import attention, kernels, numpy\nfrom lra.data import x") == []


def test_training_starts_where_triton_is_not_installed():
    """There are no wheels of it but for Linux."""
    without = "import sys; sys.modules['triton'] = None; import lra.train"
    done = subprocess.run([sys.executable, "-c", without], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

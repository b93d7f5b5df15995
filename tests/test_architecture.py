"""Who may import whom: the sources are parsed, and this table holds.

A lower layer never names a higher one, so each module can be read, tested and replaced with
nothing but the layers below it in mind.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: Lowest first. A module may import from the layers before its own, and from its own package.
LAYERS = [
    ("errors", "_version"),
    ("reference",),
    ("policy",),
    ("_arrays",),
    ("_types",),
    ("_options",),
    ("_check",),
    ("_cpu", "_cuda"),
    ("_backend",),
    ("_graph",),
    ("stage1",),
    ("_call",),
    ("attention",),
    ("",),  # cusparge/__init__.py
    ("viz",),
    ("cli",),
    ("__main__",),
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

#: The oracle shares no code with what it tests, and product code does not lean on the oracle.
ORACLE_IMPORTS = {"errors"}
ORACLE_USERS = {"_backend", "", "viz", "cli", "__main__"}

#: Never imported while a module of cusparge is being imported: their users have loaded them.
FRAMEWORKS = {"torch", "jax", "jaxlib", "cupy", "ml_dtypes", "tensorflow"}
#: What may be imported at top level beside the standard library: the library runs on NumPy alone.
THIRD_PARTY = {"viz": {"numpy"}, "cli": {"numpy", "rich", "safetensors"}, "__main__": set()}


def sources():
    """Return {dotted name inside cusparge ("" for the package itself): source text}."""
    found = {}
    for path in sorted((ROOT / "cusparge").rglob("*.py")):
        parts = path.relative_to(ROOT / "cusparge").with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts)] = path.read_text()
    return found


def imports(name, text, known):
    """Yield (imported module, is at top level), modules of cusparge as "cusparge" + inner name."""
    is_package = name == "" or any(other.startswith(name + ".") for other in known)

    def walk(node, top):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, top
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    here = ["cusparge", *filter(None, name.split("."))]
                    here = here[: len(here) - child.level + is_package]
                    base = ".".join([*here, *filter(None, [base])])
                for alias in child.names:
                    inner = f"{base}.{alias.name}".partition(".")[2]
                    is_module = base.partition(".")[0] == "cusparge" and inner in known
                    yield (f"{base}.{alias.name}" if is_module else base), top
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, top and not inside)

    yield from walk(ast.parse(text), True)


def violations(modules):
    """Return a sentence for every import that the table forbids."""
    problems = []
    for name, text in modules.items():
        package = name.partition(".")[0]
        if package not in RANK:
            problems.append(f"cusparge.{name} has no layer")
            continue
        for imported, top in imports(name, text, modules):
            root, _, inner = imported.partition(".")
            if root == "cusparge":
                target = inner.partition(".")[0]
                where = f"cusparge.{name} imports cusparge.{inner}"
                if target not in RANK:
                    problems.append(f"{where}, which has no layer")
                elif target != package and RANK[target] >= RANK[package]:
                    problems.append(f"{where}, which is not below it")
                if package == "reference" and target not in ORACLE_IMPORTS:
                    problems.append(f"{where}: the oracle stands alone")
                if target == "reference" and package not in ORACLE_USERS:
                    problems.append(f"{where}: only {sorted(ORACLE_USERS)} may use the oracle")
            elif root in FRAMEWORKS and top:
                problems.append(f"cusparge.{name} imports {root} at top level")
            elif top and root not in sys.stdlib_module_names:
                if root not in THIRD_PARTY.get(package, {"numpy"}):
                    problems.append(f"cusparge.{name} imports {root} at top level")
            elif package == "reference" and root not in sys.stdlib_module_names | {"numpy"}:
                problems.append(f"cusparge.{name} imports {root}: the oracle stands alone")
    return problems


def test_every_import_follows_the_table():
    modules = sources()
    assert {"", "reference", "policy", "_cpu.backend", "_arrays.dlpack"} <= modules.keys()
    assert violations(modules) == []


PLANTED = {
    "upwards": ("policy", "from cusparge._check import check_arrays"),
    "upwards, the module itself": ("_types", "from cusparge import _cpu"),
    "upwards, relative": ("_arrays.view", "from .. import _check"),
    "upwards, inside a function": ("_check", "def f():\n    import cusparge._backend"),
    "the package from below": ("_cpu.tiles", "import cusparge"),
    "an unknown module": ("attention", "from cusparge.helpers import x"),
    "a module without a layer": ("misc", "import math"),
    "the oracle uses ours": ("reference", "from cusparge.policy import TopCdf"),
    "the oracle uses another library": ("reference", "def f():\n    import scipy"),
    "ours uses the oracle": ("_cpu.tiles", "from cusparge import reference"),
    "a framework": ("_arrays.adapters", "import torch"),
    "a framework's part": ("_arrays.adapters", "from jax.numpy import array"),
    "a framework in a try": ("_backend", "try:\n    import cupy\nexcept ImportError:\n    pass"),
    "a framework in the command line": ("cli", "import torch"),
    "a dependency of the command line": ("_cpu.threads", "import threadpoolctl"),
    "matplotlib": ("viz", "import matplotlib"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_detected(name):
    module, text = PLANTED[name]
    modules = sources()
    modules[module] = modules.get(module, "") + "\n" + text + "\n"
    assert len(violations(modules)) >= 1


ALLOWED = {
    "downwards": ("attention", "from cusparge.errors import CuspargeError"),
    "in its own package": ("_cpu.tiles", "from cusparge._cpu import rounding"),
    "relative, in its own package": ("_cpu.tiles", "from . import rounding"),
    "a framework, when it is called": ("_arrays.adapters", "def f():\n    import torch"),
    "the backend uses the oracle": ("_backend", "from cusparge.reference import attention"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_allowed_is_not_reported(name):
    module, text = ALLOWED[name]
    modules = sources()
    modules[module] += "\n" + text + "\n"
    assert violations(modules) == []


def test_importing_cusparge_loads_numpy_alone():
    script = (
        "import sys, numpy; before = set(sys.modules); import cusparge\n"
        "names = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(*sorted(names - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert "cusparge" in done.stdout.split()
    assert set(done.stdout.split()) <= {"cusparge", "numpy"}

"""How the code is built: modules import downwards only, a step is three frames deep, test files stay readable."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from family import CLASSES
from twins import needs_library, runs

import xgrad_optim

PACKAGE = Path(xgrad_optim.__file__).resolve().parent
TESTS = Path(__file__).resolve().parent

OPTIMIZERS = {cls.__module__.removeprefix("xgrad_optim.") for cls in CLASSES}
LAYERS = (  # from the bottom; a module imports from layers below its own, an optimizer from another one too
    {"groups", "rule", "layout", "notes", "exchange", "covers", "recorders", "backends.build"},
    {"numeric", "backends", "backends.build_cuda", "hooks"},
    {"options", "attach"},
    {"state", "rows"},
    {"launch"},
    {"numbers", "backends.addresses"},
    {"settle", "backends.torch", "backends.cpu", "backends.gpu"},
    {"backends.cuda", "inventory"},
    {"plan"},
    {"checkpoint"},
    {"modes"},
    {"optimizer"},
    OPTIMIZERS,
    {"wrapper"},
    {""},
    {"__main__"},
)
LEVELS = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _imports(node: ast.AST) -> set[str]:
    """Modules of the package that it imports when it runs."""
    if _is_for_types_only(node):
        return set()
    found = set()
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "xgrad_optim":
        origin = (node.module or "").removeprefix("xgrad_optim").removeprefix(".")
        names = [f"{origin}.{alias.name}".removeprefix(".") for alias in node.names]
        found = {name if name in LEVELS else origin for name in names}
    return found.union(*map(_imports, ast.iter_child_nodes(node)))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=_module)
def test_imports_run_downwards(path):
    module = _module(path)
    upwards = {name for name in _imports(ast.parse(path.read_text())) if LEVELS[name] >= LEVELS[module]}
    if module in OPTIMIZERS:
        upwards -= OPTIMIZERS
    assert not upwards, f"{module} imports {upwards}"


def test_no_optimizers_import_each_other_in_a_circle():
    imports = {name: _imports(ast.parse((PACKAGE / f"{name}.py").read_text())) & OPTIMIZERS for name in OPTIMIZERS}
    assert imports["adabelief"] == {"adam"}
    TopologicalSorter(imports).prepare()  # raises CycleError


@needs_library
def test_a_steady_step_is_three_frames_deep():
    """step(), the planner, the plan; then the operator."""
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = xgrad_optim.XAdamW([param], backend="cpu")
    for _ in range(2):
        optimizer.step()
    (run,) = runs(optimizer)
    operator, depths = run.runner.run, []

    def look():
        frame, depth = sys._getframe(1), 0
        while frame is not None:
            depth += Path(frame.f_code.co_filename).is_relative_to(PACKAGE)
            frame = frame.f_back
        depths.append(depth)
        operator()

    run.runner.run = look
    optimizer.step()
    assert depths == [3]


def _test_files() -> list[Path]:
    return sorted(TESTS.rglob("test_*.py"))


@pytest.mark.parametrize("path", _test_files(), ids=lambda path: path.stem)
def test_no_test_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 400


def test_no_test_imports_from_a_test():
    for path in _test_files():
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(module.rpartition(".")[2].startswith("test_") for module in modules), path

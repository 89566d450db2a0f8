"""The house keeps its floors: what imports what, and that the engine lives without ComfyUI."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

TESTS = ROOT / "tests"
HOST_MODULES = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server", "aiohttp")

# part of the pack -> the parts it may import
ARROWS = {
    "engine": {"engine"},
    "nodes": {"nodes", "engine"},
    "comfy_workspace": set(),
    "contact_sheet": {"engine"},
    "training": {"training", "engine"},
    "demo": {"engine", "comfy_workspace", "contact_sheet"},
    "cli": {"cli", "engine", "comfy_workspace", "demo"},
}


def modules(part):
    path = ROOT / part
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imports(file):
    """(absolute module name or None, path inside the pack or None) of every import anywhere in the file."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, None
        elif isinstance(node, ast.ImportFrom):
            climbed = node.level - 1
            assert climbed <= len(package), f"{file}:{node.lineno} climbs out of the pack"
            base = package[: len(package) - climbed]
            for alias in node.names:
                yield None, (*base, *(node.module.split(".") if node.module else (alias.name,)))


def test_every_part_of_the_pack_has_its_place():
    files = {path.stem for path in ROOT.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert files | folders == set(ARROWS)


@pytest.mark.parametrize("part", ARROWS)
def test_arrows_point_down(part):
    for file in modules(part):
        for absolute, inside in imports(file):
            if inside is not None:
                assert inside[0] in ARROWS[part], f"{file} imports {'.'.join(inside)}"
            else:
                assert absolute.split(".")[0] != "comfyui_mend", f"{file} names the pack, which ComfyUI calls otherwise"


@pytest.mark.parametrize("part", [part for part in ARROWS if part != "nodes"])
def test_only_the_nodes_know_comfyui(part):
    for file in modules(part):
        for absolute, _ in imports(file):
            assert absolute is None or absolute.split(".")[0] not in HOST_MODULES, f"{file} imports {absolute}"


def test_types_stand_on_nothing_of_ours():
    assert [inside for _, inside in imports(ROOT / "engine" / "types.py") if inside is not None] == []


def test_the_root_imports_nothing_when_comfyui_imports_it():
    body = ast.parse((ROOT / "__init__.py").read_text()).body
    assert not [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]


def run_python(code):
    return subprocess.run([sys.executable, "-c", code, str(TESTS)], capture_output=True, text=True, cwd=TESTS.anchor)


def test_the_engine_is_imported_where_no_comfyui_can_be():
    names = [
        ".".join(("comfyui_mend", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for file in modules("engine")
    ]
    assert "comfyui_mend.engine.inpaint" in names
    code = f"""
import importlib, sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HOST_MODULES!r}:
            raise ImportError(f"the engine asked for {{name}}")

sys.meta_path.insert(0, Wall())
sys.path.insert(0, sys.argv[1])
import conftest
for name in {names!r}:
    importlib.import_module(name)
heavy = {{"diffusers", "transformers", "cv2", "onnxruntime", "patchmatch", "scipy.ndimage", "huggingface_hub"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", "imported without being used"


def test_help_does_not_wait_for_torch():
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest
from comfyui_mend.cli import main
try:
    main(["inpaint", "--help"])
except SystemExit as end:
    print("exit", end.code, "torch" in sys.modules, "numpy" in sys.modules)
"""
    done = run_python(code)
    assert done.stdout.splitlines()[-1] == "exit 0 False False", done.stderr


def test_the_wheel_holds_every_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    hidden = {".venv", "tests", "build", "dist", "benchmarks", "training"}
    folders = {path.parent.relative_to(ROOT) for path in ROOT.rglob("__init__.py")}
    found = {folder for folder in folders if not hidden & set(folder.parts)}
    assert sorted(listed) == sorted(".".join(("comfyui_mend", *folder.parts)) for folder in found)


def test_the_wheel_holds_the_shipped_configs_and_models():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    models = ROOT / "engine" / "models"
    shipped = {path for name in ("configs", "shipped") for path in (models / name).rglob("*") if path.is_file()}
    matched = {
        path for pattern in data["comfyui_mend.engine.models"] for path in models.glob(pattern) if path.is_file()
    }
    assert shipped and shipped == matched

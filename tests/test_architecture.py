"""The layers of docs/architecture.md, held against the imports: `python -m tests.test_architecture` prints them."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_ROOT_FILES, MAX_LAYERS, MAX_DOORS, MAX_DATA_MODULES, MAX_ARGUMENTS = 24, 10, 110, 15, 7
MAX_LINES = {"routing_module.py": 260, "contracts.py:Network": 60, "routing_module.py:run_blocks": 40}
# A room is a file at the root or a package. It may import rooms of lower layers only.
LAYERS = [
    {"system", "randomness", "routing_module"},
    {"solvers", "autoencoder", "conditions", "routing_blocks", "alignment"},
    {"data", "contracts", "routing_diffusers"},
    {"dit", "edm", "ddpm", "guidance"},
    {"lightningdit", "maskdit", "mixers", "weights"},
    {"sprint", "checkpoints"},
    {"cost", "sample", "evaluation"},
    {"training", "rf"},
    {"fid", "export", "train"},
    {"scripts"},
]
# What only the backbones themselves know of, their official key tables (weights/) and bench's plain reference.
INSIDE = {"attn", "mlp", "adaLN_modulation", "final_layer", "products", "positions", "pos_embed"}
BACKBONES = {"dit", "lightningdit", "sprint", "maskdit", "mixers", "weights"}
LONG_SIGNATURES = {"edm_sampler", "flow_sampler", "ddpm_sampler"}  # whose arguments are the papers'


@cache
def modules() -> dict[str, Path]:
    """{dotted name: file} of all code but the tests."""
    outside = {"tests", "runs", "datasets", "outputs", "multirun", "wandb"}
    paths = [p.relative_to(ROOT) for p in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/**/*.py"))]
    return {".".join(p.with_suffix("").parts).removesuffix(".__init__"): p for p in paths if p.parts[0] not in outside}


@cache
def imports() -> set[tuple[str, str]]:
    """(importer, imported) modules, imports inside functions included."""
    found = set()
    for name, path in modules().items():
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [target if target in modules() else node.module for target in targets]
            else:
                continue
            found |= {(name, target) for target in targets if target in modules() and target != name}
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def doors() -> set[tuple[str, str]]:
    return {(room(a), room(b)) for a, b in imports() if room(a) != room(b)}


def functions() -> dict[str, int]:
    """{file:qualified name: number of arguments, self not counted}."""
    counts = {}
    for path in modules().values():
        for parent in ast.walk(ast.parse((ROOT / path).read_text())):
            for node in ast.iter_child_nodes(parent):
                if isinstance(node, ast.FunctionDef):
                    method = f"{parent.name}." if isinstance(parent, ast.ClassDef) else ""
                    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls", "ctx")]
                    counts[f"{path}:{method}{node.name}"] = len(names)
    return counts


def test_every_door_leads_down():
    layer = {name: i for i, rooms in enumerate(LAYERS) for name in rooms}
    assert {room(module) for module in modules()} == layer.keys()
    assert [door for door in sorted(doors()) if layer[door[0]] <= layer[door[1]]] == []


def test_the_layers_are_the_documented_ones():
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", rooms)) for _, rooms in sorted(rows, key=lambda row: int(row[0]))] == LAYERS


def test_the_modules_of_a_package_form_no_circle():
    remaining = set(imports())
    while leaves := {b for _, b in remaining} - {a for a, _ in remaining}:
        remaining = {(a, b) for a, b in remaining if b not in leaves}
    assert remaining == set()


def test_the_house_stays_small():
    print(measures())
    assert len(root_files()) <= MAX_ROOT_FILES
    data_modules = [p for p in modules().values() if p.parts[0] == "data" and p.name != "__init__.py"]
    assert len(data_modules) <= MAX_DATA_MODULES
    assert len(longest_path()) <= MAX_LAYERS == len(LAYERS)
    assert len(doors()) <= MAX_DOORS


def test_no_function_takes_more_than_seven_arguments():
    long = {name for name, count in functions().items() if count > MAX_ARGUMENTS}
    assert {name.partition(":")[2] for name in long} <= LONG_SIGNATURES


def test_the_method_and_the_contract_fit_on_a_page():
    assert {name: lines for name, lines in lengths().items() if lines > MAX_LINES[name]} == {}


def test_the_method_needs_torch_alone():
    tree = ast.parse((ROOT / "routing_module.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}


def test_only_backbones_know_what_is_inside_a_network():
    assert list(looks_inside()) == []


def looks_inside() -> Iterator[str]:
    """file:line of what reaches into a network from outside. data/ has none, and its positions are those of samples."""
    for name, path in modules().items():
        if room(name) in BACKBONES | {"data"}:
            continue
        tree = ast.parse((ROOT / path).read_text())
        if str(path) == "scripts/bench.py":  # the plain step, and what OpCounter has counted
            tree.body = [node for node in tree.body if not getattr(node, "name", "").lower().startswith("plain")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                counted = str(path) == "scripts/bench.py" and node.attr == "products"
                size = node.attr == "size" and ast.unparse(node.value).rpartition(".")[2] == "model"
                if (node.attr in INSIDE and not counted) or size:
                    yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def lengths() -> dict[str, int]:
    """The lines of what MAX_LINES names."""
    found = {}
    for name in MAX_LINES:
        path, _, part = name.partition(":")
        text = (ROOT / path).read_text()
        nodes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        found[name] = nodes[part].end_lineno - nodes[part].lineno + 1 if part else len(text.splitlines())
    return found


def root_files() -> list[Path]:
    return [path for path in modules().values() if len(path.parts) == 1]


def measures() -> str:
    """The house in figures."""
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in modules().values()}
    scripts = sum(n for path, n in lines.items() if path.parts[0] == "scripts")
    return "\n".join([
        f"{len(root_files())} root files, {len(doors())} doors, {len(longest_path())} layers",
        f"longest chain {' > '.join(longest_path())}",
        f"{sum(lines.values()) - scripts} lines of library, {scripts} of scripts",
        *(f"{n} lines of {name}" for name, n in lengths().items()),
    ])  # fmt: skip


def longest_path() -> list[str]:
    """The rooms of the longest chain of imports, from the top down."""
    below: dict[str, set[str]] = {}
    for importer, imported in doors():
        below.setdefault(importer, set()).add(imported)

    @cache
    def chain(name: str) -> list[str]:
        return [name, *max((chain(other) for other in below.get(name, ())), key=len, default=[])]

    return max((chain(name) for name in below), key=len)


if __name__ == "__main__":
    for number, rooms in reversed(list(enumerate(LAYERS))):
        print(f"{number:2}  {', '.join(sorted(rooms))}")
    print(measures())

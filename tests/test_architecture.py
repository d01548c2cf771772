"""The floor plan of docs/architecture.md, held against the imports: `python -m tests.test_architecture` prints it."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_ROOT_FILES, MAX_FLOORS, MAX_DOORS, MAX_DATA_MODULES, MAX_ARGUMENTS = 18, 9, 95, 13, 7
# A room is a file at the root or a package. It may import rooms of lower floors only.
FLOORS = [
    {"system"},
    {"randomness", "autoencoder"},
    {"routing_module", "solvers", "data"},
    {"dit", "edm", "ddpm", "guidance", "cost", "routing_diffusers"},
    {"lightningdit", "maskdit"},
    {"sprint", "checkpoints"},
    {"sample", "evaluation", "training"},
    {"fid", "export", "rf"},
    {"train"},
    {"scripts"},
]
# Their arguments are the papers': samplers, and constructors of networks.
LONG_SIGNATURES = {"edm_sampler", "flow_sampler", "ddpm_sampler"}
LONG_SIGNATURES |= {f"{network}.__init__" for network in ("DiT", "LightningDiT", "MaskDiT", "Sprint")}


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
    floor = {name: i for i, rooms in enumerate(FLOORS) for name in rooms}
    assert {room(module) for module in modules()} <= floor.keys()
    assert [door for door in sorted(doors()) if floor[door[0]] <= floor[door[1]]] == []


def test_the_floors_are_the_documented_ones():
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", rooms)) for _, rooms in sorted(rows, key=lambda row: int(row[0]))] == FLOORS


def test_the_modules_of_a_package_form_no_circle():
    remaining = set(imports())
    while leaves := {b for _, b in remaining} - {a for a, _ in remaining}:
        remaining = {(a, b) for a, b in remaining if b not in leaves}
    assert remaining == set()


def test_the_house_stays_small():
    assert len([path for path in modules().values() if len(path.parts) == 1]) <= MAX_ROOT_FILES
    data_modules = [p for p in modules().values() if p.parts[0] == "data" and p.name != "__init__.py"]
    assert len(data_modules) <= MAX_DATA_MODULES
    assert len(longest_path()) <= MAX_FLOORS
    assert len(doors()) <= MAX_DOORS


def test_no_function_takes_more_than_seven_arguments():
    long = {name for name, count in functions().items() if count > MAX_ARGUMENTS}
    assert {name.partition(":")[2] for name in long} <= LONG_SIGNATURES


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
    for number, rooms in reversed(list(enumerate(FLOORS))):
        print(f"{number:2}  {', '.join(sorted(rooms))}")
    root_files = sum(len(path.parts) == 1 for path in modules().values())
    print(f"{root_files} root files, {len(doors())} doors, longest chain {' > '.join(longest_path())}")

"""The laws of ``docs/architecture.md`` as functions from a parsed file to its violations.

Each rule yields ``(line, what)``. Rules are heuristics on syntax: they find the usual ways to break a law, and
``test_rules.py`` shows for each one code that it must refuse and code that it must let pass.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "zeropipe"
MAX_LINES = 400

Violation = tuple[int, str]


@dataclass(frozen=True, slots=True)
class File:
    """A source file. ``path`` is relative to the package, e.g. ``comm/group.py``."""

    path: str
    text: str = field(repr=False)
    tree: ast.Module = field(repr=False)

    @classmethod
    def parse(cls, path: str, text: str) -> File:
        return cls(path, text, ast.parse(text, path))


def source_files() -> list[File]:
    paths = sorted(p for p in SOURCE.rglob("*.py"))
    return [File.parse(p.relative_to(SOURCE).as_posix(), p.read_text()) for p in paths]


def dotted(node: ast.expr) -> str:
    """``a.b.c`` for a chain of attributes, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return ""


def imported(file: File) -> Iterator[tuple[int, str]]:
    """Every module that a file names in an import: lazy ones and those for type checkers too.

    ``from a import b`` names ``a`` and ``a.b``, as either may be the module.
    """
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = Path(file.path).parent.parts
                base = (
                    "zeropipe",
                    *package[: len(package) - node.level + 1],
                )
                module = ".".join([*base, module]).rstrip(".")
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            yield from ((node.lineno, a.value) for a in node.args[:1] if _is_text(a))


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def names(file: File, *modules: str) -> Iterator[Violation]:
    """Uses of a module, by import or as ``torch.distributed.x`` after ``import torch``."""
    found = {
        (line, module)
        for line, name in imported(file)
        for module in modules
        if name == module or name.startswith(module + ".")
    }
    found |= {
        (node.lineno, dotted(node))
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Attribute) and dotted(node) in modules
    }
    for line, module in sorted(found):
        yield line, f"names {module}"


def bypasses_the_seam(file: File) -> Iterator[Violation]:
    """``zeropipe.comm`` hands users torch.distributed's own functions; our code must not take them there."""
    ours = {p.stem for p in (SOURCE / "comm").glob("*.py")} | {
        "Event",
        "Group",
        "init_distributed",
        "record",
    }
    aliases = {"zeropipe.comm"}
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ImportFrom) and node.module == "zeropipe.comm":
            for alias in node.names:
                if alias.name not in ours:
                    yield node.lineno, f"takes {alias.name} from torch.distributed, past comm/collectives.py"
        elif isinstance(node, ast.ImportFrom) and node.module == "zeropipe":
            aliases |= {alias.asname or alias.name for alias in node.names if alias.name == "comm"}
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute) and dotted(node.value) in aliases and node.attr not in ours:
            yield node.lineno, f"takes {node.attr} from torch.distributed, past comm/collectives.py"


# ---- state ----

_CONTAINERS = {
    "dict",
    "list",
    "set",
    "defaultdict",
    "Counter",
    "deque",
    "OrderedDict",
    "count",
    "local",
    "ContextVar",
    "WeakKeyDictionary",
    "WeakValueDictionary",
    "WeakSet",
}
_CHANGES = {
    "append",
    "add",
    "update",
    "pop",
    "setdefault",
    "clear",
    "extend",
    "insert",
    "remove",
    "discard",
    "popitem",
    "appendleft",
    "popleft",
}


def global_state(file: File) -> Iterator[Violation]:
    """State that belongs to no object: ``global``, and containers of a module or class that are filled later."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}"
        elif isinstance(node, ast.ClassDef):
            for name, value, line in _assigned(node.body):
                if _fresh_container(value):
                    yield line, f"class {node.name} shares one mutable {name} among all its objects"
    module_names = {name for name, _, _ in _assigned(file.tree.body)}
    for name, value, line in _assigned(file.tree.body):
        if _fresh_container(value) and name != "__all__":
            yield line, f"module-level mutable {name}"
    for function in _functions(file.tree):
        local = _locals(function)
        for node in ast.walk(function):
            name = _changed(node)
            if name and name in module_names and name not in local:
                yield node.lineno, f"changes the module-level {name}"


def class_state(file: File) -> Iterator[Violation]:
    """Assignments to a class instead of an object (``cls.count += 1``): shared by all engines of a process."""
    classes = {node.name for node in ast.walk(file.tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(file.tree):
        for target in _targets(node):
            if isinstance(target, ast.Attribute):
                owner = target.value
                text = dotted(owner)
                by_type = isinstance(owner, ast.Call) and dotted(owner.func) == "type"
                if text in ("cls", "self.__class__") or text in classes or by_type:
                    yield node.lineno, f"assigns to the class: {ast.unparse(target)}"


def patches_torch(file: File) -> Iterator[Violation]:
    """Assignments to attributes of torch's modules and classes."""
    roots = {"torch", "nn", "F", "Module", "Tensor", "Parameter"}
    for node in ast.walk(file.tree):
        for target in _targets(node):
            if isinstance(target, ast.Attribute) and dotted(target).split(".")[0] in roots:
                yield node.lineno, f"patches {dotted(target)}"
        if (
            isinstance(node, ast.Call)
            and (dotted(node.func).split(".")[-1] in ("setattr", "delattr", "_replace") or _patch(node))
            and node.args
            and dotted(node.args[0]).split(".")[0] in roots
        ):
            yield node.lineno, f"patches {dotted(node.args[0])} by {dotted(node.func)}"


def _patch(node: ast.Call) -> bool:
    return dotted(node.func) in ("patch.object", "mock.patch.object")


def _assigned(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr, int]]:
    for node in body:
        if isinstance(node, ast.Assign):
            yield from (
                (target.id, node.value, node.lineno)
                for target in node.targets
                if isinstance(target, ast.Name)
            )
        elif isinstance(node, ast.AnnAssign) and node.value is not None and isinstance(node.target, ast.Name):
            yield node.target.id, node.value, node.lineno


def _fresh_container(value: ast.expr) -> bool:
    if isinstance(value, ast.List | ast.Set):
        return not value.elts
    if isinstance(value, ast.Dict):
        return not value.keys
    if isinstance(value, ast.Call):
        # dict(a=1) is a table; dict(), defaultdict(list), count(0) are there to be filled.
        name = dotted(value.func).split(".")[-1]
        return name in _CONTAINERS and not (
            name in ("dict", "list", "set") and (value.args or value.keywords)
        )
    return False


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _locals(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    a = function.args
    found = {arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def _changed(node: ast.AST) -> str:
    """The name whose contents a statement or call changes."""
    for target in _targets(node):
        if isinstance(target, ast.Subscript):
            return dotted(target.value)
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in _CHANGES
        and isinstance(node.func.value, ast.Name)
    ):
        return node.func.value.id
    return ""


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return [
            t for target in node.targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])
        ]
    if isinstance(node, ast.AugAssign):
        return [node.target]
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        return [node.target]
    return list(node.targets) if isinstance(node, ast.Delete) else []


# ---- one owner of padding ----

_WORLD = re.compile(r"(^|\.)(world|world_size|num_shards|dp|dp_size|num_ranks|size)$")


def computes_padding(file: File) -> Iterator[Violation]:
    """Arithmetic that only ``layout/flat.py`` may do: ceiling division, remainders by the number of ranks.

    Refusing what does not divide (``if n % world:``) is not computing padding, nor is using a layout's figure.
    """
    checks = _conditions(file.tree)
    for node in ast.walk(file.tree):
        if isinstance(node, ast.UnaryOp | ast.BinOp | ast.Call) and _ceiling_division(node):
            yield node.lineno, f"ceiling division {ast.unparse(node)}"
        elif (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Mod)
            and node not in checks
            and _WORLD.search(dotted(node.right))
            and not _is_text(node.left)
        ):
            yield node.lineno, f"remainder {ast.unparse(node)}"
        for target in _targets(node):
            if re.search(r"(^|[._])pad(ding|ded)?(_|$)", dotted(target)) and isinstance(
                getattr(node, "value", None), ast.BinOp
            ):
                yield node.lineno, f"computes {dotted(target)}"


def _conditions(tree: ast.AST) -> set[ast.AST]:
    """Every node inside a condition."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        roots: list[ast.expr] = []
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            roots = [node.test]
        elif isinstance(node, ast.comprehension):
            roots = node.ifs
        elif isinstance(node, ast.Compare | ast.BoolOp):
            roots = [node]
        found.update(inner for root in roots for inner in ast.walk(root))
    return found


def _ceiling_division(node: ast.UnaryOp | ast.BinOp | ast.Call) -> bool:
    if isinstance(node, ast.UnaryOp):  # -(-x // n)
        inner = node.operand
        return (
            isinstance(node.op, ast.USub)
            and isinstance(inner, ast.BinOp)
            and isinstance(inner.op, ast.FloorDiv)
            and isinstance(inner.left, ast.UnaryOp)
            and isinstance(inner.left.op, ast.USub)
        )
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.FloorDiv) and _adds_one_less(node)
    divided = node.args[0] if node.args else None
    return (
        dotted(node.func) in ("math.ceil", "ceil")
        and isinstance(divided, ast.BinOp)
        and isinstance(divided.op, ast.Div)
    )


def _adds_one_less(node: ast.BinOp) -> bool:
    """``(x + n - 1) // n``."""
    divisor = ast.unparse(node.right)
    top = ast.unparse(node.left).replace("(", "").replace(")", "")
    return top.endswith(f"+ {divisor} - 1") or top.startswith(f"{divisor} - 1 +") or f"+ {divisor} - 1" in top


# ---- form ----


def lacks_docstring(file: File) -> Iterator[Violation]:
    if file.text.strip() and not ast.get_docstring(file.tree):
        yield 1, "does not open with a sentence that says why it exists"


def too_long(file: File) -> Iterator[Violation]:
    lines = file.text.count("\n")
    if lines > MAX_LINES:
        yield lines, f"{lines} lines: probably two ideas"


def bare_except(file: File) -> Iterator[Violation]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except"


def prints(file: File) -> Iterator[Violation]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and dotted(node.func) in (
            "print",
            "sys.stdout.write",
            "sys.stderr.write",
        ):
            yield node.lineno, f"{dotted(node.func)}(...)"


def unfinished(file: File) -> Iterator[Violation]:
    for number, line in enumerate(file.text.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            yield number, line.strip()


def takes_anything(file: File) -> Iterator[Violation]:
    """An argument of a public function that is typed ``Any``: its type, or a name of ``given.py`` that says why not."""
    for node, public in _with_publicity(file.tree, True):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if public and (not node.name.startswith("_") or node.name == "__init__"):
            for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                if arg.annotation is not None and _is_any(arg.annotation):
                    yield arg.lineno, f"{node.name}({arg.arg}: {ast.unparse(arg.annotation)})"


def _with_publicity(node: ast.AST, public: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Everything in modules and classes, but not inside functions; and whether only public classes are around it."""
    for inner in ast.iter_child_nodes(node):
        yield inner, public
        if isinstance(inner, ast.ClassDef):
            yield from _with_publicity(inner, public and not inner.name.startswith("_"))


def _is_any(annotation: ast.expr) -> bool:
    """``Any``, alone or beside other types, of which it makes nothing more."""
    if isinstance(annotation, ast.BinOp):
        return _is_any(annotation.left) or _is_any(annotation.right)
    return dotted(annotation) in ("Any", "typing.Any")

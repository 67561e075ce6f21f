"""The laws of structure, which hold for the tree as a whole: who names whom, how wide a class is, who writes what.

They count so that they cannot be met by splitting: a class has the methods that it inherits, an import under
TYPE_CHECKING or inside a function is an import, a private method is a method. Each takes all files and yields
``(path, line, what)``. ``python -m tests.architecture.structure`` prints the figures.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from tests.architecture.rules import ROOT, File, dotted, source_files

Found = tuple[str, int, str]
MAX_FOLDER = 16  # files, a package's __init__ among them
MAX_WIDTH = 25


def module(file: File) -> str:
    """``zeropipe.comm.group`` for ``comm/group.py``; a package for its ``__init__``."""
    name = file.path.removesuffix(".py").replace("/", ".")
    return f"zeropipe.{name}".removesuffix(".__init__").removesuffix(".zeropipe")


# ---- imports ----


def edges(files: Sequence[File]) -> dict[str, dict[str, int]]:
    """{module: {module that it names in an import, wherever it stands: line}}."""
    known = {module(file) for file in files}
    found: dict[str, dict[str, int]] = {name: {} for name in known}
    for file in files:
        own = found[module(file)]
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    own.setdefault(inner if inner in known else node.module, node.lineno)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    own.setdefault(alias.name, node.lineno)
        found[module(file)] = {name: line for name, line in own.items() if name in known - {module(file)}}
    return found


def circles(graph: dict[str, dict[str, int]]) -> list[list[str]]:
    """The sets of modules that reach each other, largest first (Tarjan 1972, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []
    for root in graph:
        if root in index:
            continue
        work = [(root, iter(graph[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        while work:
            node, rest = work[-1]
            for other in rest:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    work.append((other, iter(graph[other])))
                    break
                if other in stack:
                    low[node] = min(low[node], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    at = stack.index(node)
                    if len(stack) - at > 1:
                        found.append(sorted(stack[at:]))
                    del stack[at:]
    return sorted(found, key=len, reverse=True)


def goes_in_a_circle(files: Sequence[File]) -> Iterator[Found]:
    graph = edges(files)
    paths = {module(file): file.path for file in files}
    for members in circles(graph):
        for name in members:
            for other, line in graph[name].items():
                if other in members:
                    yield paths[name], line, f"imports {other}, which leads back here ({len(members)} files)"


def names_a_module_in_a_string(files: Sequence[File]) -> Iterator[Found]:
    """A path that is looked up when it is asked for goes round every contract on imports."""
    known = {module(file) for file in files}
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                path = node.value.partition(":")[0]
                if "." in path and path in known:
                    yield file.path, node.lineno, f"names the module {path} in a string"


def imports_what_is_not_there(files: Sequence[File]) -> Iterator[Found]:
    """A module of ours that no file is, or a name that the file does not define."""
    known = {module(file): _top_names(file) for file in files}
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "zeropipe" and alias.name not in known:
                        yield file.path, node.lineno, f"imports {alias.name}, which is no module"
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "zeropipe":
                there = known.get(node.module or "")
                if there is None:
                    yield file.path, node.lineno, f"imports from {node.module}, which is no module"
                elif "*" not in there:
                    for alias in node.names:
                        if alias.name not in {*there, "*"} and f"{node.module}.{alias.name}" not in known:
                            yield file.path, node.lineno, f"imports {alias.name}, which {node.module} lacks"


def _top_names(file: File) -> set[str]:
    """What a module defines or imports; ``*`` where it answers for names by itself."""
    found: set[str] = set()
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found | ({"*"} if "__getattr__" in found else set())


# ---- classes ----


def is_forward(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """One statement besides the docstring, an expression or a return: it hands a call on."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return len(body) <= 1 and all(isinstance(node, ast.Return | ast.Expr) for node in body)


def widths(files: Sequence[File]) -> dict[tuple[str, int, str], int]:
    """{(path, line, class): its methods with those that it inherits from ours, forwards left out}."""
    classes: dict[str, tuple[str, int, list[str], set[str]]] = {}
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ClassDef):
                methods = {
                    f.name
                    for f in node.body
                    if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) and not is_forward(f)
                }
                bases = [dotted(base).split(".")[-1] for base in node.bases]
                classes[node.name] = file.path, node.lineno, bases, methods

    def methods_of(name: str, seen: frozenset[str]) -> set[str]:
        if name not in classes or name in seen:
            return set()
        _, _, bases, own = classes[name]
        return own.union(*(methods_of(base, seen | {name}) for base in bases))

    return {
        (path, line, name): len(methods_of(name, frozenset())) for name, (path, line, _, _) in classes.items()
    }


def is_wide(files: Sequence[File]) -> Iterator[Found]:
    for (path, line, name), width in widths(files).items():
        if width > MAX_WIDTH:
            yield path, line, f"class {name} has {width} methods with what it inherits"


def writes_anothers_attribute(files: Sequence[File]) -> Iterator[Found]:
    """``other.state = x`` where ``state`` is an attribute of another file's class: that has a method."""
    owners: dict[str, set[str]] = defaultdict(set)
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ClassDef) and not _is_frozen(node):
                for name in _attributes(node):
                    owners[name].add(file.path)
    for file in files:
        for node in ast.walk(file.tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else targets
            for target in targets:
                if (
                    isinstance(target, ast.Attribute)
                    and dotted(target.value) not in ("self", "cls")
                    and owners.get(target.attr)
                    and file.path not in owners[target.attr]
                    and target.attr not in _TORCHS
                ):
                    yield (
                        file.path,
                        node.lineno,
                        f"writes {ast.unparse(target)}, of {sorted(owners[target.attr])[0]}",
                    )


_FORMS = "one of the forms in which a user may give it"
_STANDS_IN = "stands where a value of any type may stand, and is looked for there"
# Classes of ours that may be asked for, and why.
ASKED = {
    **dict.fromkeys(
        ("Config", "Group", "LayerSpec", "PipelineModule", "Schedule", "SubparamShape", "TiedLayerSpec"),
        _FORMS,
    ),
    **dict.fromkeys(
        ("Absent", "AbsentGradient", "AwayValue", "Lazy", "LossScalerValues", "Stored"), _STANDS_IN
    ),
    "_Away": "the class of a parameter whose value is away; it is exchanged on the user's object",
    "Framed": "a hook of ours among the hooks of others on a module",
    "_Around": "a hook of ours among the hooks of others on a module",
    "_Call": "a node of ours among autograd's",
    "Fetching": "a dict of ours that torch hands back among others",
    "_Cast": "a layer of ours among the user's",
    "KeepsDtype": "a layer of ours among the user's",
    "Mark": "a mark of ours among the metadata of a field",
    "Optimizer": "a user's object may be torch's optimizer, or have one",
}

# Attributes of torch's objects, which ours may have too.
_TORCHS = frozenset(
    {"data", "grad", "requires_grad", "training", "step", "__class__", "forward", "weight", "bias"}
)


def _is_frozen(node: ast.ClassDef) -> bool:
    """Nobody can write to it, so whoever writes to an attribute of the name means another class."""
    text = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    return "frozen=True" in text or any(dotted(base).endswith("NamedTuple") for base in node.bases)


def _attributes(node: ast.ClassDef) -> set[str]:
    """Names of the values that an object of the class has: annotated in its body, or assigned to ``self``."""
    found = {
        s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
    }
    for inner in ast.walk(node):
        targets = inner.targets if isinstance(inner, ast.Assign) else []
        targets = [inner.target] if isinstance(inner, ast.AnnAssign | ast.AugAssign) else targets
        for target in targets:
            if isinstance(target, ast.Attribute) and dotted(target.value) == "self":
                found.add(target.attr)
    return found


def asks_for_our_class(files: Sequence[File]) -> Iterator[Found]:
    """``isinstance(x, OurClass)``: what differs belongs in a method or a table, not in a question about kinds.

    Errors are caught by kind, and a Protocol is there to be asked for; neither counts. Nor does what ``ASKED`` lists.
    """
    ours = {
        n.name
        for file in files
        for n in ast.walk(file.tree)
        if isinstance(n, ast.ClassDef) and not _is_open(n)
    }
    ours -= ASKED.keys()
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Call) and dotted(node.func) == "isinstance" and len(node.args) == 2:
                for kind in ast.walk(node.args[1]):
                    if isinstance(kind, ast.Name) and kind.id in ours:
                        yield file.path, node.lineno, f"asks whether something is a {kind.id}"


def _is_open(node: ast.ClassDef) -> bool:
    return node.name.endswith("Error") or any(dotted(base).endswith("Protocol") for base in node.bases)


def casts(files: Sequence[File]) -> Iterator[Found]:
    """``cast(...)`` hides that something is used as what it is not known to be."""
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Call) and dotted(node.func) in ("cast", "typing.cast"):
                yield file.path, node.lineno, ast.unparse(node)


# ---- folders and lines ----


def is_full(files: Sequence[File]) -> Iterator[Found]:
    counts = Counter(PurePosixPath(file.path).parent.as_posix() for file in files)
    for folder, count in counts.items():
        if count > MAX_FOLDER:
            yield folder, 1, f"{count} files in a folder: {MAX_FOLDER} at most"


_MARKS = re.compile(r"#\s*(type:|noqa|fmt:|!|-+\s*\w*\s*-*$)")


def own_line_comments(text: str) -> int:
    """Lines that are a comment alone; marks for tools and rulers do not count."""
    return sum(
        token.type == tokenize.COMMENT
        and token.line.strip().startswith("#")
        and not _MARKS.match(token.string)
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
    )


def figures(files: Sequence[File]) -> dict[str, object]:
    """What the laws count, of a tree."""
    lines = sum(file.text.count("\n") for file in files)
    tests = sum(path.read_text().count("\n") for path in (ROOT / "tests").rglob("*.py"))
    width, (_, _, widest) = max((width, at) for at, width in widths(files).items())
    folders = Counter(PurePosixPath(file.path).parent.as_posix() for file in files)
    return {
        "lines": lines,
        "files": len(files),
        "longest file": max(file.text.count("\n") for file in files),
        "files of the fullest folder": max(folders.values()),
        "circles of imports": [len(members) for members in circles(edges(files))],
        "methods of the widest class": f"{width} ({widest})",
        "lines that are comments": f"{sum(own_line_comments(file.text) for file in files) / lines:.1%}",
        "lines of tests for a line of source": f"{tests / lines:.2f}",
        "attributes written from another file": len(list(writes_anothers_attribute(files))),
        "questions about our classes": len(list(asks_for_our_class(files))),
        "casts": len(list(casts(files))),
        "module paths in strings": len(list(names_a_module_in_a_string(files))),
    }


if __name__ == "__main__":
    from tests.architecture.walk import returns, walk

    way = walk()
    told = figures(source_files()) | {
        "stops from initialize to the engine": f"{len(way)}, {returns(way)} returns"
    }
    for what, value in told.items():
        print(f"{what:40} {value}")

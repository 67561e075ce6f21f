"""Each rule refuses what it is for and lets its neighbours pass: a law whose test cannot fail is no law."""

from __future__ import annotations

import ast

import pytest

from tests.architecture import rules, structure
from tests.architecture.rules import File
from tests.architecture.test_laws import Rule, TreeRule, check


def torch_distributed(file: File) -> object:
    return rules.names(file, "torch.distributed")


CASES = [
    (torch_distributed, "import torch.distributed as dist", "import torch"),
    (torch_distributed, "from torch import distributed", "from torch import nn"),
    (torch_distributed, "from torch.distributed import ReduceOp", "from zeropipe.comm import record"),
    (torch_distributed, "import torch\nx = torch.distributed.get_rank()", "import torch\nx = torch.ones(1)"),
    (torch_distributed, "import torch.distributed.tensor", "import torch.distributions"),
    (torch_distributed, "importlib.import_module('torch.distributed')", "run('-m', 'torch.distributed.run')"),
    (
        torch_distributed,
        "if TYPE_CHECKING:\n    from torch.distributed import ProcessGroup",
        "'''Built on torch.distributed.'''",
    ),
    (torch_distributed, "def f():\n    import torch.distributed", "def f():\n    import torch.nn"),
    (
        rules.bypasses_the_seam,
        "from zeropipe.comm import all_reduce",
        "from zeropipe.comm.collectives import all_reduce",
    ),
    (
        rules.bypasses_the_seam,
        "from zeropipe import comm\ncomm.get_rank()",
        "from zeropipe import comm\ncomm.record()",
    ),
    (rules.bypasses_the_seam, "from zeropipe.comm import ReduceOp", "from zeropipe.comm import Group"),
    (rules.global_state, "def f():\n    global x\n    x = 1", "def f():\n    x = 1"),
    (rules.global_state, "cache = {}", "TABLE = {'a': 1}"),
    (rules.global_state, "seen: list[int] = []", "def f():\n    seen: list[int] = []"),
    (rules.global_state, "ids = itertools.count()", "__all__ = []"),
    (rules.global_state, "class A:\n    hooks = []", "class A:\n    names = ('a',)"),
    (
        rules.global_state,
        "class A:\n    x: dict = defaultdict(list)",
        "@dataclass\nclass A:\n    x: dict = field(default_factory=dict)",
    ),
    (
        rules.global_state,
        "T = {'a': 1}\ndef f():\n    T['b'] = 2",
        "T = {'a': 1}\ndef f(T):\n    T['b'] = 2",
    ),
    (
        rules.global_state,
        "T = [1]\ndef f():\n    T.append(2)",
        "T = [1]\ndef f():\n    T = []\n    T.append(2)",
    ),
    (rules.class_state, "class A:\n    def f(self):\n        A.n += 1", "class A:\n    n = 1"),
    (
        rules.class_state,
        "class A:\n    @classmethod\n    def f(cls):\n        cls.n = 1",
        "class A:\n    def f(self):\n        self.n = 1",
    ),
    (
        rules.class_state,
        "class A:\n    def f(self):\n        type(self).n = 1",
        "class A:\n    def f(self):\n        type(self).n",
    ),
    (rules.patches_torch, "nn.Module.__init__ = f", "module.forward = f"),
    (rules.patches_torch, "torch.nn.functional.linear = f", "self.torch = f"),
    (rules.patches_torch, "setattr(torch.nn.Linear, 'forward', f)", "setattr(module, 'forward', f)"),
    (rules.patches_torch, "patch.object(torch.cuda, 'synchronize', f)", "patch.object(model, 'forward', f)"),
    (rules.patches_torch, "self._replace(torch.nn.Module, 'apply', f)", "self._replace(cls, 'apply', f)"),
    (rules.computes_padding, "x = -(-n // world)", "x = n // world"),
    (rules.computes_padding, "x = (n + k - 1) // k", "x = (n + k) // k"),
    (rules.computes_padding, "x = math.ceil(n / k)", "x = math.ceil(y)"),
    (rules.computes_padding, "x = n % world_size", "x = n % 2"),
    (rules.computes_padding, "x = n % self.num_shards", "x = '%d' % size"),
    (rules.computes_padding, "self.padding = a - b", "self.padding = layout.padding"),
    (rules.computes_padding, "x = y + n % world", "if n % world:\n    raise ValueError"),
    (rules.computes_padding, "x = n % size", "ok = n % size == 0 and [d for d in ds if d % size]"),
    (rules.lacks_docstring, "x = 1", '"""Why."""'),
    (rules.lacks_docstring, "# why\nx = 1", ""),
    (rules.too_long, "x = 1\n" * 500, "x = 1\n" * 400),
    (rules.bare_except, "try:\n    x\nexcept:\n    y", "try:\n    x\nexcept OSError:\n    y"),
    (rules.prints, "print(1)", "printer(1)"),
    (rules.prints, "sys.stdout.write('x')", "file.write('x')"),
    (rules.unfinished, "# TO" + "DO: later", "# to do so is right"),
    (rules.takes_anything, "def f(x: Any): ...", "def f(x: Tree, *args: Any, **kwargs: Any) -> Any: ..."),
    (rules.takes_anything, "class A:\n    def __init__(self, x: int | Any): ...", "def _f(x: Any): ..."),
    (rules.takes_anything, "def f(*, x: typing.Any): ...", "class _A:\n    def f(self, x: Any): ..."),
    (rules.takes_anything, "async def f(x: Any): ...", "def f(x: dict[str, Any]):\n    def g(y: Any): ..."),
]


@pytest.mark.parametrize(("rule", "bad", "good"), CASES)
def test_rule(rule: Rule, bad: str, good: str) -> None:
    assert list(rule(File.parse("runtime/x.py", bad))), "should be refused"
    assert not list(rule(File.parse("runtime/x.py", good))), "should pass"


METHODS = "".join(f"    def _f{i}(self):\n        a = {i}\n        return a\n" for i in range(20))
FORWARDS = "".join(f"    def g{i}(self):\n        return self.part.g{i}()\n" for i in range(20))
MORE = METHODS.replace("_f", "_h")
GUARDED = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from zeropipe.a.x import X"
TREES: list[tuple[TreeRule, dict[str, str], dict[str, str]]] = [
    (
        structure.goes_in_a_circle,
        {"a/x.py": "from zeropipe.a import y", "a/y.py": GUARDED},
        {"a/x.py": "from zeropipe.a import y", "a/y.py": "from zeropipe.a.z import X", "a/z.py": ""},
    ),
    (
        structure.goes_in_a_circle,
        {
            "a/x.py": "import zeropipe.a.y",
            "a/y.py": "def f():\n    import zeropipe.a.z",
            "a/z.py": "import zeropipe.a.x",
        },
        {
            "a/x.py": "import zeropipe.a.y",
            "a/y.py": "def f():\n    import zeropipe.a.z",
            "a/z.py": "import torch",
        },
    ),
    (
        structure.imports_what_is_not_there,
        {"a.py": "def f():\n    from zeropipe.gone import X"},
        {"a.py": "def f():\n    from zeropipe.b import X, c", "b/__init__.py": "X = 1", "b/c.py": ""},
    ),
    (
        structure.imports_what_is_not_there,
        {"a.py": "from zeropipe.b import Y", "b.py": "X = 1"},
        {"a.py": "from zeropipe.b import Y", "b.py": "__getattr__ = lazy(__name__)"},
    ),
    (
        structure.is_wide,
        {"a.py": f"class A:\n{METHODS}", "b.py": f"class B(A):\n{MORE}"},
        {"a.py": f"class A:\n{METHODS}", "b.py": f"class B(A):\n{FORWARDS}", "c.py": f"class C:\n{MORE}"},
    ),
    (
        structure.names_a_module_in_a_string,
        {"a.py": "where = 'zeropipe.b.c'", "b/c.py": ""},
        {"a.py": "log = 'zeropipe.other'; text = 'see zeropipe.b.c there'", "b/c.py": ""},
    ),
    (
        structure.names_a_module_in_a_string,
        {"a.py": "where = 'zeropipe.b.c:Name'", "b/c.py": ""},
        {"a.py": "from zeropipe.b.c import Name", "b/c.py": ""},
    ),
    (
        structure.writes_anothers_attribute,
        {"a.py": "class A:\n    def f(self):\n        self.holds = 1", "b.py": "def f(a):\n    a.holds += 1"},
        {
            "a.py": "class A:\n    def f(self, b):\n        self.holds = b.holds = 1",
            "b.py": "def f(a):\n    a.f(a)",
        },
    ),
    (
        structure.asks_for_our_class,
        {"a.py": "class A: ...", "b.py": "isinstance(x, (int, A))"},
        {
            "a.py": "class AError(Exception): ...\nclass P(Protocol): ...",
            "b.py": "isinstance(x, AError)\nisinstance(x, P)",
        },
    ),
    (structure.casts, {"a.py": "x = cast('A', self)"}, {"a.py": "x = self.cast(1)"}),
    (
        structure.is_full,
        {f"a/f{i}.py": "" for i in range(17)},
        {f"{'ab'[i % 2]}/f{i}.py": "" for i in range(17)},
    ),
]


@pytest.mark.parametrize(("rule", "bad", "good"), TREES)
def test_rule_of_structure(rule: TreeRule, bad: dict[str, str], good: dict[str, str]) -> None:
    assert list(rule([File.parse(path, text) for path, text in bad.items()])), "should be refused"
    assert not list(rule([File.parse(path, text) for path, text in good.items()])), "should pass"


def test_classes_that_may_be_asked_for_exist() -> None:
    known = {
        n.name for file in rules.source_files() for n in ast.walk(file.tree) if isinstance(n, ast.ClassDef)
    }
    assert structure.ASKED.keys() - known <= {"Optimizer"}  # torch's, of the same name as a section of ours


def test_rulers_and_marks_for_tools_are_no_comments() -> None:
    text = "# a reason\nx = 1  # behind code\n# ---- state ----\n# fmt: off\n# noqa: E501\n#!/bin/sh\n    # another\n"
    assert structure.own_line_comments(text) == 2


def test_relative_imports_are_resolved() -> None:
    file = File.parse("layout/flat.py", "from ..comm import group\nfrom . import buckets")
    assert [what for _, what in rules.names(file, "zeropipe.comm")] == [
        "names zeropipe.comm",
    ]
    assert [what for _, what in rules.names(file, "zeropipe.layout.buckets")] == [
        "names zeropipe.layout.buckets"
    ]


def test_a_violation_is_reported_with_its_place_and_stale_exceptions_too() -> None:
    bad = File.parse("a/b.py", '"""Why."""\nprint(1)')
    with pytest.raises(AssertionError, match=r"src/zeropipe/a/b\.py:2: print"):
        check([bad], rules.prints, {})
    check([bad], rules.prints, {"a/*": "may"})
    with pytest.raises(AssertionError, match="no longer needed"):
        check([bad], rules.bare_except, {"a/*": "may"})

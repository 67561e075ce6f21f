"""Each rule refuses what it is for and lets its neighbours pass: a law whose test cannot fail is no law."""

from __future__ import annotations

import pytest

from tests.architecture import rules
from tests.architecture.rules import File
from tests.architecture.test_laws import Rule, check


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
    (
        rules.too_many_methods,
        "class A:\n" + "".join(f"    def f{i}(self): ...\n" for i in range(25)),
        "class A:\n" + "".join(f"    def _f{i}(self): ...\n" for i in range(25)),
    ),
    (rules.bare_except, "try:\n    x\nexcept:\n    y", "try:\n    x\nexcept OSError:\n    y"),
    (rules.prints, "print(1)", "printer(1)"),
    (rules.prints, "sys.stdout.write('x')", "file.write('x')"),
    (rules.unfinished, "# TO" + "DO: later", "# to do so is right"),
]


@pytest.mark.parametrize(("rule", "bad", "good"), CASES)
def test_rule(rule: Rule, bad: str, good: str) -> None:
    assert list(rule(File.parse("runtime/x.py", bad))), "should be refused"
    assert not list(rule(File.parse("runtime/x.py", good))), "should pass"


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

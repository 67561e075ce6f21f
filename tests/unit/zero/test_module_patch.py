"""The patch of nn.Module sees each outermost constructor once, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from zeropipe.runtime.zero.gather import init
from zeropipe.runtime.zero.gather.init import ModulePatch


class Log:
    """Gives frames that write down what runs in them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.running: list[nn.Module | None] = []

    def frame(self, module: nn.Module | None) -> AbstractContextManager[None] | None:
        if module is not None and any(module is other for other in self.running):
            return None
        return self.run(module)

    @contextmanager
    def run(self, module: nn.Module | None) -> Iterator[None]:
        name = "a function" if module is None else type(module).__name__
        self.running.append(module)
        self.events.append(f"begin {name}")
        try:
            yield
        except BaseException:
            self.events.append(f"abort {name}")
            raise
        finally:
            assert self.running.pop() is module
        self.events.append(f"end {name} {0 if module is None else len(module._parameters)}")


def snapshot() -> Any:
    classes = {cls: vars(cls).get("__init__") for cls in init._family(nn.Module)}
    return dict(vars(nn.Module)), classes, [getattr(torch, name) for name in init.CONSTRUCTORS]


@contextmanager
def patched(log: Log, **kwargs: Any) -> Iterator[ModulePatch]:
    with ModulePatch(log.frame, **kwargs) as patch:
        yield patch


class Parent(nn.Module):
    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(1))
        if fail:
            raise ValueError


class Child(Parent):
    def __init__(self, fail: bool = False) -> None:
        super().__init__(fail)
        self.b = nn.Parameter(torch.ones(1))


class Heir(Child):  # no constructor of its own
    pass


class Foreign:
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.ones(1))


class Mixed(Foreign, nn.Module):
    pass


@pytest.mark.parametrize(
    ("cls", "parameters"), [(Parent, 1), (Child, 2), (Heir, 2), (Mixed, 1), (nn.Linear, 2)]
)
def test_the_outermost_constructor_is_seen_once(cls, parameters):
    log = Log()
    before = snapshot()
    with patched(log):
        cls(*([2, 2] if cls is nn.Linear else []))
    assert log.events == [f"begin {cls.__name__}", f"end {cls.__name__} {parameters}"]
    assert snapshot() == before
    cls(*([2, 2] if cls is nn.Linear else []))
    assert len(log.events) == 2


def test_a_constructor_that_raises():
    log = Log()
    before = snapshot()
    with patched(log):
        with pytest.raises(ValueError):
            Child(fail=True)
        Child()
    assert log.events == ["begin Child", "abort Child", "begin Child", "end Child 2"]
    assert snapshot() == before


def test_classes_made_inside_and_patches_inside_patches():
    outer, inner = Log(), Log()
    before = snapshot()
    with patched(outer), patched(inner):

        class Made(nn.Linear):
            def __init__(self) -> None:
                super().__init__(1, 1)

        Made()
    assert inner.events == outer.events == ["begin Made", "end Made 2"]
    Made()
    assert len(outer.events) == 2
    after = snapshot()
    assert after[0] == before[0] and all(after[1][cls] is init for cls, init in before[1].items())


def test_signatures_stay():
    import inspect

    expected = inspect.signature(nn.Linear)
    with patched(Log()):
        assert inspect.signature(nn.Linear) == expected
        assert nn.Linear.__init__.__doc__ == nn.Linear.__init__.__wrapped__.__doc__


def test_apply_runs_each_function_in_a_frame():
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh()))
    seen: list[str] = []
    log = Log()
    with patched(log):
        assert model.apply(lambda m: seen.append(type(m).__name__)) is model
    assert seen == ["ReLU", "Tanh", "Sequential", "Sequential"]
    assert log.events == ["begin a function", "end a function 0"] * 4


def test_what_others_replaced_meanwhile_stays_theirs():
    log = Log()
    original = Parent.__init__
    with patched(log):
        wrapped = Parent.__init__

        def theirs(self: Parent) -> None:
            wrapped(self)

        Parent.__init__ = theirs  # type: ignore[method-assign, assignment]
    try:
        assert Parent.__init__ is theirs
        Parent()
        assert log.events == []  # our wrapper inside does nothing any more
    finally:
        Parent.__init__ = original  # type: ignore[method-assign]


def test_an_install_that_fails_leaves_nothing():
    before = snapshot()

    def broken(function: Any) -> Any:
        raise KeyError("replacement")

    with pytest.raises(KeyError, match="replacement"):
        ModulePatch(Log().frame, broken).__enter__()
    assert snapshot() == before


def test_constructors_are_replaced_and_put_back():
    original = torch.arange
    with patched(Log(), constructor=lambda fn: (lambda *a: "ours") if fn is original else fn):
        assert torch.arange(3) == "ours"
        assert torch.zeros(1).item() == 0
    assert torch.arange is original


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module, cls: str) -> None:
        super().__init__()
        self.inner, self.kind = module, cls


def test_arguments_may_have_the_names_that_the_wrapper_uses():
    log = Log()
    with patched(log):
        assert Wrapper(module=nn.ReLU(), cls="any").kind == "any"
    assert log.events[-1] == "end Wrapper 0"


def test_patches_inside_patches_undo_themselves_where_the_innermost_fails():
    before = snapshot()
    outer = Log()

    def broken(function: Any) -> Any:
        raise KeyError("replacement")

    with patched(outer):
        with pytest.raises(KeyError), ModulePatch(Log().frame, broken):
            pass
        Child()
    assert outer.events == ["begin Child", "end Child 2"]
    assert snapshot() == before

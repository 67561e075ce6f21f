"""Which layers a stage gets."""

from itertools import pairwise

import pytest
from torch import nn

from zeropipe.errors import ConfigError, UsageError
from zeropipe.runtime.pipe.layers import LayerFacts, LayerSpec, TiedLayerSpec, partition

FACTS = [
    LayerFacts("Embedding", parameters=100, memory=900, profile=1),
    *[LayerFacts("Block", parameters=10, memory=100, profile=50)] * 6,
    LayerFacts("Head", parameters=100, memory=100, profile=60),
]


@pytest.mark.parametrize(
    ("method", "bounds"),
    [
        ("uniform", (0, 4, 8)),
        ("parameters", (0, 4, 8)),
        ("type:block", (0, 4, 8)),
        ("type:^(embedding|head)$", (0, 4, 8)),
        ("memory", (0, 1, 8)),
        ("profile", (0, 5, 8)),
        ([0, 1, 8], (0, 1, 8)),
    ],
)
def test_methods(method, bounds):
    found = partition(method, len(FACTS), [0, 1], lambda: FACTS)
    if method == "type:^(embedding|head)$":
        assert 1 <= found[1] <= 7  # anywhere between the two is as good
    else:
        assert found == bounds


def test_what_a_rank_has_in_all_of_its_stages_counts():
    """Of a V: the ends of the model, with the heavier head, are on one rank."""
    weights = [0, *[100] * 8, 140]
    facts = [LayerFacts("Layer", profile=weight) for weight in weights]
    found = partition("profile", len(facts), [0, 1, 1, 0], lambda: facts)
    first, *_, last = [sum(weights[a:b]) for a, b in pairwise(found)]
    assert (first + last, sum(weights) - first - last) == (440, 500)
    assert max(sum(weights[a:b]) for a, b in pairwise(found)) == 300


def test_uniform_does_not_weigh_layers():
    def never():
        raise AssertionError

    assert partition("uniform", 3, [0, 1], never) == (0, 2, 3)


@pytest.mark.parametrize(
    ("method", "stages", "words"),
    [
        ("uniform", 9, ["at least one layer for each of 9 stages", "8 layers"]),
        ("even", 2, ["'even'", "type:REGEX"]),
        ("type:attention", 2, ["matches too few", "Block"]),
        ("type:(", 2, ["regular expression"]),
        ([0, 8], 2, ["3 ascending numbers"]),
        ([0, 9, 8], 2, ["ascending"]),
        ([1, 2, 8], 2, ["from 0 to 8"]),
    ],
)
def test_mistakes(method, stages, words):
    with pytest.raises(ConfigError) as caught:
        partition(method, len(FACTS), range(stages), lambda: FACTS)
    for word in words:
        assert word in str(caught.value)


def test_layer_spec_builds_with_its_arguments():
    spec = LayerSpec(nn.Linear, 3, 4, bias=False)
    layer = spec.build()
    assert layer.weight.shape == (4, 3)
    assert layer.bias is None
    assert repr(spec) == "LayerSpec(Linear, 3, 4, bias=False)"


def test_tied_layer_spec_takes_one_attribute_or_several():
    assert TiedLayerSpec("e", nn.Linear, 2, 2).tied_weight_attr == ["weight"]
    assert TiedLayerSpec("e", nn.Linear, 2, 2, tied_weight_attr="bias").tied_weight_attr == ["bias"]
    assert TiedLayerSpec("e", nn.Linear, 2, 2, tied_weight_attr=["weight", "bias"]).tied_weight_attr == [
        "weight",
        "bias",
    ]


def test_layer_spec_refuses_a_built_module():
    with pytest.raises(UsageError, match="needs a class"):
        LayerSpec(nn.Linear(2, 2))


def test_the_specs_are_found_beside_the_module_too():
    """One of the paths under which users know them."""
    from zeropipe.runtime.pipe import layers, module

    assert (module.LayerSpec, module.TiedLayerSpec) == (layers.LayerSpec, layers.TiedLayerSpec)

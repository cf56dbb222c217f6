"""Units: which modules travel together, on real model families and on random trees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import offload
from offload._units import ROOT_NAME, Unit, find_units


def names(units: list[Unit]) -> list[str]:
    return [unit.name for unit in units]


def assert_sound(model: nn.Module) -> list[Unit]:
    """What holds for every model; returns its units."""
    units = find_units(model)
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    covered = {id(parameter) for unit in units for _, parameter in unit.parameters}
    assert covered == set(canonical)
    assert len({id(module) for unit in units for module in unit.modules if not unit.is_root}) == sum(
        not unit.is_root for unit in units
    )
    for unit in units:
        assert unit.parameters, f"{unit.name} holds nothing"
        assert len({id(parameter) for _, parameter in unit.parameters}) == len(unit.parameters)
        assert all(canonical[id(parameter)] == name for name, parameter in unit.parameters)
        if not unit.is_root:
            (module,) = unit.modules
            assert type(module).forward is not nn.Module.forward
            # A unit holds its whole subtree: no parameter inside a hooked module is left to another unit.
            assert {id(p) for p in module.parameters()} == {id(p) for _, p in unit.parameters}
    assert [unit.is_root for unit in units[1:]].count(True) == 0
    return units


def small(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, dict[str, Any]] = {
        "Llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
        "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
        "T5": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
        "Bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    }
    heads = {"Llama": "CausalLM", "GPT2": "CausalLM", "T5": "Seq2SeqLM", "Bert": "MaskedLM"}
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, **sizes[kind])
    model: nn.Module = getattr(transformers, f"AutoModelFor{heads[kind]}").from_config(config)
    return model


def test_llama() -> None:
    blocks = [f"model.layers.{i}" for i in range(3)]
    assert names(assert_sound(small("Llama"))) == ["model.embed_tokens", *blocks, "model.norm", "lm_head"]


def test_gpt2_tied_head_belongs_to_both() -> None:
    units = assert_sound(small("GPT2"))
    blocks = [f"transformer.h.{i}" for i in range(3)]
    assert names(units) == ["transformer.wte", "transformer.wpe", *blocks, "transformer.ln_f", "lm_head"]
    embedding, head = units[0], units[-1]
    assert [name for name, _ in head.parameters] == ["transformer.wte.weight"]
    assert head.parameters[0][1] is embedding.parameters[0][1]


def test_t5_embedding_belongs_to_every_unit_that_holds_it() -> None:
    units = assert_sound(small("T5"))
    found = names(units)
    holders = [unit.name for unit in units if "shared.weight" in dict(unit.parameters)]
    assert {"encoder.embed_tokens", "decoder.embed_tokens"} <= set(holders) or holders == ["shared", "lm_head"]
    assert {"encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"} <= set(found)
    assert not any(".layer." in name for name in found), "lists inside a block stay inside it"


def test_bert() -> None:
    found = names(assert_sound(small("Bert")))
    assert found[0] == "bert.embeddings"
    assert {f"bert.encoder.layer.{i}" for i in range(3)} <= set(found)


def test_nn_transformer() -> None:
    model = nn.Transformer(16, 2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=32)
    assert names(assert_sound(model)) == [
        "encoder.layers.0",
        "encoder.layers.1",
        "encoder.norm",
        "decoder.layers.0",
        "decoder.layers.1",
        "decoder.norm",
    ]


def test_mlp_of_equal_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2))
    assert names(assert_sound(model)) == ["0", "2", "4", "5"]


def test_bare_layer_is_one_root_unit() -> None:
    (unit,) = assert_sound(nn.Linear(3, 4))
    assert unit.is_root and unit.name == ROOT_NAME
    assert [name for name, _ in unit.parameters] == ["weight", "bias"]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.conv(x))


class ConvNet(nn.Module):
    """Stages of blocks held as attributes, as residual networks are written, and a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.stage1 = nn.Sequential(Residual(4), Residual(4))
        self.stage2 = nn.Sequential(Residual(4), Residual(4))
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage2(self.stage1(self.stem(x)))
        return self.scale * self.head(x.mean((2, 3)))


def test_conv_net_with_a_parameter_between() -> None:
    units = assert_sound(ConvNet())
    assert names(units) == [ROOT_NAME, "stem", "stage1.0", "stage1.1", "stage2.0", "stage2.1", "head"]
    assert [name for name, _ in units[0].parameters] == ["scale"]
    assert units[0].is_root and not units[1].is_root


class UsedFromOutside(nn.Module):
    """Containers whose forward is never called, because they have none."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.LayerNorm(2)})
        self.mixed = nn.ModuleList([nn.Linear(2, 3), nn.Embedding(2, 2)])
        self.nested = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2)])
        self.loose = nn.ParameterList([nn.Parameter(torch.ones(2))])
        self.named = nn.ParameterDict({"gain": nn.Parameter(torch.ones(2))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_containers_without_a_forward_are_never_units() -> None:
    units = assert_sound(UsedFromOutside())
    assert names(units) == [
        ROOT_NAME,
        "towers.a",
        "towers.b",
        "mixed.0",
        "mixed.1",
        "nested.0.0",
        "nested.0.1",
        "nested.1.0",
        "nested.1.1",
    ]
    assert [name for name, _ in units[0].parameters] == ["loose.0", "named.gain"]


def test_one_layer_used_many_times_is_one_unit() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"layers": nn.ModuleList([shared] * 4)})
    assert names(assert_sound(model)) == ["layers.0"]


def test_a_model_without_parameters_has_no_units() -> None:
    assert find_units(nn.Sequential(nn.ReLU(), nn.Tanh())) == []


def test_frozen_parameters_belong_to_units_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    assert sum(len(unit.parameters) for unit in assert_sound(model)) == 4


class Branch(nn.Module):
    def __init__(self, children: list[nn.Module], parameter: nn.Parameter | None) -> None:
        super().__init__()
        for index, child in enumerate(children):
            self.add_module(f"child{index}", child)
        if parameter is not None:
            self.weight = parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def grow(children: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[nn.Module]:
    some = st.lists(children, max_size=4)
    return st.one_of(
        st.builds(nn.ModuleList, some),
        st.builds(lambda modules: nn.Sequential(*modules), some),
        st.builds(Branch, some, st.sampled_from([None, TIED]) | st.builds(lambda: nn.Parameter(torch.ones(1)))),
    )


TIED = nn.Parameter(torch.ones(1))
SHARED = nn.Linear(1, 1)
leaves = st.one_of(
    st.builds(lambda: nn.Linear(1, 1)),
    st.builds(nn.ReLU),
    st.just(SHARED),
    st.builds(lambda: nn.ParameterList([nn.Parameter(torch.ones(1))])),
)


@given(
    st.builds(lambda modules: Branch(modules, None), st.lists(st.recursive(leaves, grow, max_leaves=12), max_size=4))
)
def test_every_parameter_of_any_tree_has_a_unit(model: nn.Module) -> None:
    assert_sound(model)


def test_named_units() -> None:
    class Inner(nn.Linear):
        pass

    def model() -> nn.Module:
        tree = nn.ModuleDict({"a": nn.Sequential(Inner(2, 2), nn.Linear(2, 2)), "b": nn.Linear(2, 2), "c": Inner(2, 2)})
        tree["a"][0].inner = Inner(2, 2)
        return tree

    assert names(find_units(model(), [Inner])) == ["a.0", "a.1", "b", "c"]
    assert names(find_units(model(), ["a", Inner])) == ["a", "b", "c"]
    assert names(find_units(model(), lambda module: isinstance(module, nn.Sequential))) == ["a", "b", "c"]
    for choice in (["missing"], [nn.Conv2d], [nn.ModuleDict], lambda module: False):
        with pytest.raises(offload.InvalidArgument, match="units"):
            find_units(model(), choice)

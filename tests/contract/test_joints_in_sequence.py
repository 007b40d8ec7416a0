"""Random sequences of what users do to a model, each forward and backward beside a formula."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import F32, F64, packable
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import lora_ext
from contract import joint_ways, joints
from lora_ext.packing.layers import packable_layers

ADAPTERS = st.sampled_from("abc")
KEEPS = {"": joint_ways.plain, "reentrant": joint_ways.reentrant, "hooks": joint_ways.kept}


class Sequences(RuleBasedStateMachine):
    family = "ours"

    @initialize(names=st.sampled_from(["ab", "ac"]))
    def start(self, names):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.subject = joints.adapted(self.family, base, list(names), "two")
        self.weights = {key: value.clone() for key, value in self.frozen().items()}
        self.here, self.active, self.merged = {*names}, [*names], ()
        self.forward, self.dtype, self.seed, self.limit = self.subject.model, F64, 0, 1e-9

    def frozen(self):
        found = self.subject.model.named_parameters()
        return {key: p.detach() for key, p in found if "lora_" not in key}

    def factors(self, name):
        """A, B of both layers, in turn."""
        return self.subject.factors(name)

    @rule(name=ADAPTERS)
    def adapt(self, name):
        """Adds an adapter, or deletes one."""
        if self.family == "peft":
            self.unmerge()
        if name not in self.here:
            joints.add(self.subject, name)
            self.here.add(name)
        elif len(self.here) > 1:
            self.delete(name)
            self.here.remove(name)
            self.merged = () if name in self.merged else self.merged
        self.switch(sorted(self.here))

    def delete(self, name):
        if self.family == "peft":  # which keeps the name of one that was active
            self.subject.model.set_adapter(min(self.here - {name}))
        self.subject.delete(name)

    def switch(self, names):
        self.subject.model.to(self.dtype)  # what came has its own
        self.subject.set_adapter(names)
        self.active = list(names)

    @rule(data=st.data())
    def set_adapter(self, data):
        names = data.draw(st.lists(st.sampled_from(sorted(self.here)), unique=True, min_size=1))
        if self.family == "peft":
            self.unmerge()
        self.merged = self.merged if set(self.merged) <= set(names) else ()
        self.switch(names)

    @rule(data=st.data())
    def merge(self, data):
        """All that are active, or of ours some of them."""
        kinds = self.subject.kind.mergeable(self.active)
        self.merged = tuple(data.draw(st.sampled_from([self.active, *kinds])))
        self.subject.merge(self.merged)

    @rule(mode=st.booleans())
    def train_or_eval(self, mode):
        self.subject.model.train(mode)
        if mode and self.family == "ours":
            self.merged = ()

    @rule()
    def go_on_with_a_copy(self):
        self.subject = self.subject.holding(copy.deepcopy(self.subject.model))
        self.forward = self.subject.model

    @rule()
    def unmerge(self):
        self.subject.unmerge()
        self.merged = ()

    @rule()
    def cast(self):
        self.dtype = F64 if self.dtype == F32 else F32
        self.limit = 1e-4  # from now on
        self.subject.model.to(self.dtype)

    @precondition(lambda self: packable(F32) and not self.merged)
    @rule()
    def pack(self):
        if self.dtype == F64:
            self.cast()
        for layer in packable_layers(self.subject.model):
            layer.packed = lora_ext.pack_weight(layer.packable().weight, backward=True)
            assert layer.packed.is_packed

    @precondition(lambda self: not self.merged)
    @rule(by_data=st.booleans())
    def write(self, by_data):
        for key, value in self.frozen().items():
            self.weights[key] = torch.randn_like(value, dtype=F64)
            parameter = self.subject.model.get_parameter(key)
            with torch.no_grad():
                if by_data:
                    parameter.data = self.weights[key].to(self.dtype, copy=True)
                else:
                    parameter.copy_(self.weights[key])

    @rule(name=ADAPTERS)
    def save_and_load(self, name):
        if name not in self.here or len(self.here) == 1:
            return
        self.unmerge()
        with tempfile.TemporaryDirectory() as folder:
            self.subject.save(Path(folder), name)
            self.delete(name)
            self.subject.load(Path(folder), name)
        self.switch(sorted(self.here))

    @rule(chosen=st.integers(0, 15), outside=st.booleans())
    def compile(self, chosen, outside):
        if chosen == 5 and self.forward is self.subject.model:  # a second each
            torch._dynamo.reset()
            self.forward = torch.compile(self.subject.model, backend="aot_eager", fullgraph=True)
            if outside:
                self.step(None, "", False, False)
            self.step([min(self.here), None] * 2, "", False, False)

    @rule(
        names=st.none() | st.lists(st.none() | ADAPTERS, min_size=4, max_size=4),
        keep=st.sampled_from([*KEEPS]),
        inside=st.booleans(),
        within=st.booleans(),
    )
    def step(self, names, keep, inside, within):
        names = names and [name if name in self.here else None for name in names]
        names = None if self.merged else names
        x = self.x()
        own = x.to(self.dtype).requires_grad_()
        self.subject.model.zero_grad()
        part = joint_ways.inside if inside else joint_ways.around
        y = part(self.subject, self.forward, KEEPS[keep], names, own)
        other = ["b" if "b" in self.here else None] * 4 if within and not self.merged else None
        with joints.block(self.subject, other):
            y.square().sum().backward()
        x.requires_grad_()
        exact = torch.sin(self.exact(names, x))
        exact.square().sum().backward()
        pairs = {"y": (y, exact), "dx": (own.grad, x.grad)}
        for name, leaves in self.leaves.items():
            for number, (mine, leaf) in enumerate(zip(self.factors(name), leaves, strict=True)):
                pairs[f"{name}{number}"] = mine.grad, leaf.grad
        self.compare(pairs)

    @invariant()
    def forward_is_the_formula(self):
        x = self.x()
        with torch.no_grad():
            self.compare({"y": (self.subject(x.to(self.dtype)), self.exact(None, x))})
            if self.family == "peft" and self.merged:
                return  # which its block would unmerge
            with self.subject.disabled():
                self.compare({"y": (self.subject(x.to(self.dtype)), self.exact([None] * 4, x))})

    @invariant()
    def weights_stay_and_active_adapters_are_trained(self):
        if self.family == "ours" or not self.merged:
            self.compare({key: (p, self.weights[key]) for key, p in self.frozen().items()})
        assert self.subject.merged() == {self.merged}
        for name in self.here:
            wanted = name in self.active
            assert all(p.requires_grad == wanted for p in self.factors(name)), name

    def x(self):
        self.seed += 1
        return torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(self.seed)).double()

    def compare(self, pairs):
        for name, pair in pairs.items():
            found, wanted = (torch.zeros(()) if each is None else each.detach() for each in pair)
            limit = self.limit * max(1.0, wanted.abs().max().item())
            assert (found - wanted).abs().max().item() <= limit, name

    def exact(self, names, x):
        """x W^T + b + s (x A^T) B^T of the adapters of each row, in float64."""
        own = {
            name: [
                p.detach().double().requires_grad_(p.requires_grad and name not in self.merged)
                for p in self.factors(name)
            ]
            for name in self.here
        }
        self.leaves = own
        weights = list(self.weights.values())
        for layer in range(2):
            y = x @ weights[2 * layer].t() + weights[2 * layer + 1]
            for name in sorted(self.here):
                rows = [
                    name in self.active if names is None else name == n for n in names or [0] * 4
                ]
                a, b = own[name][2 * layer : 2 * layer + 2]
                scaling = joints.ADAPTERS[name][1] / joints.ADAPTERS[name][0]
                y = y + torch.tensor(rows).double().view(4, 1, 1) * scaling * (x @ a.t() @ b.t())
            x = y if layer else torch.tanh(y)
        return x


class SequencesOfPeft(Sequences):
    family = "peft"


def run(machine, count):
    machine = machine.TestCase
    phases = [Phase.generate, Phase.shrink]
    words = {"stateful_step_count": 10, "deadline": None, "derandomize": True, "phases": phases}
    machine.settings = settings(max_examples=count, **words)
    machine("runTest").runTest()


@pytest.mark.parametrize("count", [80, pytest.param(1000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("machine", [Sequences, SequencesOfPeft])
def test_any_sequence(forget_graphs, machine, count):
    # A checkpoint keeps what is in force from the first block of a process on.
    with joints.block(joints.make("ours linear"), joints.NAMES):
        pass
    with torch._dynamo.config.patch(recompile_limit=64):
        run(machine, count)

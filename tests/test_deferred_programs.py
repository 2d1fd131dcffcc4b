"""Random programs over deferred logits: casts, views, writes, hooks and gradients in any order give what eager gives."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_deferred import Cube, Double, assert_as_eager

STEPS = {
    "cast": lambda x: x.double(),
    "same dtype": lambda x: x.float(),
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "row": lambda x: x[0],
    "sin": lambda x: x.sin(),
    "custom": Cube.apply,
    "write": lambda x: x.mul_(2),
    "write without gradients": lambda x: torch.no_grad()(x.add_)(1),
    "set": lambda x: x.__setitem__(0, 0.5),
    "custom write": Double.apply,
    "read without gradients": lambda x: torch.no_grad()(x.exp)(),
    # grad_fn is read first: on a view that was written through another one, register_hook of torch 2.13 is a segmentation fault (pytorch issue 196459)
    "hook": lambda x: (x.grad_fn, x.register_hook(lambda gradient: gradient * 3)) and None,
    "real": lambda x: x.sum().item() and None,
}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 4)), max_size=8))
def test_any_program_gives_what_eager_gives(program):
    def use(logits):
        tensors = [logits]
        for name, i in program:
            result = STEPS[name](tensors[i % len(tensors)])
            if isinstance(result, torch.Tensor):
                tensors.append(result)
        return sum((tensor.double().cos().sum() * (i + 1) for i, tensor in enumerate(tensors)), torch.zeros(()))

    assert_as_eager(use)

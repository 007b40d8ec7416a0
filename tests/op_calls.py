"""The op family as calls of one adapter and of many, onto a weight or onto a given y: the arguments
in the order of the equation, and one gradient for each, in place of the schema's lists."""

import torch

OPS = torch.ops.lora_ext


def linear_inputs(x, weight, lora_a, lora_b, bias=None, scaling=1.0, *rest):
    """rest: dropout_p, seed, row_offset, col_offset, cast_weight, packed, packed_t, row_block."""
    return (x, weight, None, lora_a, lora_b, scaling, bias, *rest)


def update_inputs(y, x, lora_a, lora_b, scaling=1.0, *dropout):
    return (x, None, y, lora_a, lora_b, scaling, None, *dropout)


def lora_linear(x, weight, lora_a, lora_b, bias=None, scaling=1.0, *rest, **options):
    return OPS.lora(*linear_inputs(x, weight, lora_a, lora_b, bias, scaling, *rest), **options)


def lora_linear_forward(*inputs):
    return OPS.lora_forward(*linear_inputs(*inputs))


def lora_update(y, x, lora_a, lora_b, scaling=1.0, *dropout, **options):
    return OPS.lora(*update_inputs(y, x, lora_a, lora_b, scaling, *dropout), **options)


def lora_update_forward(*inputs):
    return OPS.lora_forward(*update_inputs(*inputs))


def lora_linear_backward(grad, x, weight, lora_a, lora_b, s, scaling, *rest):
    """rest: dropout, and at the end which of dx, dlora_a, dlora_b and dbias are wanted."""
    *rest, wanted = rest
    inputs = linear_inputs(x, weight, lora_a, lora_b, None, scaling, *rest)
    return OPS.lora_backward(grad, s, wanted, *inputs)


def lora_update_backward(grad, x, lora_a, lora_b, s, scaling, *rest):
    """rest: dropout, and at the end which of dx, dlora_a and dlora_b are wanted."""
    *dropout, wanted = rest
    inputs = update_inputs(None, x, lora_a, lora_b, scaling, *dropout)
    return OPS.lora_backward(grad, s, [*wanted, False], *inputs)[:3]


def grouped(scaling, index=None, offs=None, ranks=None):
    """The arguments that only many adapters have."""
    return (scaling, index, offs, ranks)


def lora_linear_grouped(x, weight, lora_a, lora_b, groups, bias=None, *rest):
    return OPS.lora_grouped(x, weight, None, lora_a, lora_b, *grouped(*groups), bias, *rest)


def lora_update_grouped(y, x, lora_a, lora_b, groups, *dropout):
    return OPS.lora_grouped(x, None, y, lora_a, lora_b, *grouped(*groups), None, *dropout)


def lora_linear_grouped_forward(x, weight, lora_a, lora_b, groups, bias=None, *rest):
    return OPS.lora_grouped_forward(x, weight, None, lora_a, lora_b, *grouped(*groups), bias, *rest)


def lora_linear_grouped_backward(grad, x, weight, lora_a, lora_b, s, groups, wanted, *rest):
    """wanted: of x and the bias; of each of lora_a; of each of lora_b."""
    inputs = (x, weight, None, lora_a, lora_b, *grouped(*groups), None, *rest)
    return OPS.lora_grouped_backward(grad, s, *wanted, *inputs)

"""The op family as calls of one adapter and of many, onto a weight or onto a given y: the arguments
in the order of the equation, and one gradient for each, in place of the schema's lists."""

import torch

OPS = torch.ops.lora_ext


def one_in_lists(inputs):
    """The inputs of lora as those of lora_forward, where factors are lists."""
    return *inputs[:3], *([factor] for factor in inputs[3:5]), *inputs[5:]


def linear_inputs(x, weight, lora_a, lora_b, bias=None, scaling=1.0, *rest):
    """rest: dropout_p, seed, row_offset, col_offset, cast_weight, packed, packed_t, row_block."""
    return (x, weight, None, lora_a, lora_b, scaling, bias, *rest)


def update_inputs(y, x, lora_a, lora_b, scaling=1.0, *dropout):
    return (x, None, y, lora_a, lora_b, scaling, None, *dropout)


def lora_linear(x, weight, lora_a, lora_b, bias=None, scaling=1.0, *rest, **options):
    return OPS.lora(*linear_inputs(x, weight, lora_a, lora_b, bias, scaling, *rest), **options)


def lora_linear_forward(*inputs):
    return OPS.lora_forward(*one_in_lists(linear_inputs(*inputs)))


def lora_update(y, x, lora_a, lora_b, scaling=1.0, *dropout, **options):
    return OPS.lora(*update_inputs(y, x, lora_a, lora_b, scaling, *dropout), **options)


def lora_update_forward(*inputs):
    return OPS.lora_forward(*one_in_lists(update_inputs(*inputs)))


def _one_of_each(dx, da, db, dbias):
    return dx, *(found[0] if found else None for found in (da, db)), dbias


def lora_linear_backward(grad, x, weight, lora_a, lora_b, s, scaling, *rest):
    """rest: dropout, and at the end which of dx, dlora_a, dlora_b and dbias are wanted."""
    *rest, (dx, da, db, dbias) = rest
    inputs = one_in_lists(linear_inputs(x, weight, lora_a, lora_b, None, scaling, *rest))
    return _one_of_each(*OPS.lora_backward(grad, s, [dx, dbias], [da], [db], *inputs))


def lora_update_backward(grad, x, lora_a, lora_b, s, scaling, *rest):
    """rest: dropout, and at the end which of dx, dlora_a and dlora_b are wanted."""
    *dropout, (dx, da, db) = rest
    inputs = one_in_lists(update_inputs(None, x, lora_a, lora_b, scaling, *dropout))
    return _one_of_each(*OPS.lora_backward(grad, s, [dx, False], [da], [db], *inputs))[:3]


def grouped(scaling, index=None, offs=None, ranks=None):
    """What many adapters add to the arguments."""
    return {"scalings": scaling, "index": index, "offs": offs, "ranks": ranks}


def lora_linear_grouped(x, weight, lora_a, lora_b, groups, bias=None, *rest):
    inputs = (x, weight, None, lora_a, lora_b, 1.0, bias, *rest)
    return OPS.lora_grouped(*inputs, **grouped(*groups))


def lora_update_grouped(y, x, lora_a, lora_b, groups, *dropout):
    inputs = (x, None, y, lora_a, lora_b, 1.0, None, *dropout)
    return OPS.lora_grouped(*inputs, **grouped(*groups))


def lora_linear_grouped_forward(x, weight, lora_a, lora_b, groups, bias=None, *rest):
    return OPS.lora_forward(x, weight, None, lora_a, lora_b, 1.0, bias, *rest, **grouped(*groups))


def lora_linear_grouped_backward(grad, x, weight, lora_a, lora_b, s, groups, wanted, *rest):
    """wanted: of x and the bias; of each of lora_a; of each of lora_b."""
    inputs = (x, weight, None, lora_a, lora_b, 1.0, None, *rest)
    return OPS.lora_backward(grad, s, *wanted, *inputs, **grouped(*groups))

"""What DeepSpeed's ZeRO-3 asks of a module."""

from __future__ import annotations


class ZeroLeaf:
    """A mix-in of layers that read the parameters of their parts without calling those.

    ZeRO-3 hangs a hook on each module, which gathers the module's own parameters when it is called.
    Of a "leaf" it gathers those of all parts at once, and has no hooks within: base and factors are
    whole in the layer's forward, and again in its backward. The name is DeepSpeed's, which
    `deepspeed.utils.set_z3_leaf_modules` sets.
    """

    _z3_leaf = True

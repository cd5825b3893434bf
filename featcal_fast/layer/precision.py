"""Float32 products that stay float32: torch's switches for rounding their operands, off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

PARENTS = ("generic", "all"), ("cuda", "all"), ("mkldnn", "all")
PRODUCTS = ("cuda", "matmul"), ("mkldnn", "matmul")
OTHERS = ("cuda", "conv"), ("cuda", "rnn"), ("mkldnn", "conv"), ("mkldnn", "rnn")


@contextmanager
def ieee_float32() -> Iterator[None]:
    """No float32 product or convolution is rounded (TF32, bfloat16) within the context, whatever the process allows.

    Afterwards every switch is as it was, also those that inherit, and those that contradict each other. What torch may
    do with 16-bit products (float16 sums, reductions in lower precision) is not touched. The switches are the whole
    process's, so other threads' products are not rounded meanwhile either.
    """
    with ExitStack() as stack:
        if hasattr(torch._C, "_set_fp32_precision_setter"):
            _switch_off(stack)
        else:  # an older torch; it has two switches
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
            torch.backends.cudnn.allow_tf32 = False
        # Reading it fails where it contradicts `PRODUCTS`: not here any more, nor within the context, where
        # torch.compile and tunable products read it. It sets them too, so it is put back before them.
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        yield


def _switch_off(stack: ExitStack) -> None:
    """Switches of newer versions: one for each library and kind of operation, which may inherit from its parents.

    Not by the attributes in `torch.backends`: the one for all of mkldnn sets the one for all libraries.
    """
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter

    def switch(key: tuple[str, str], to: str) -> None:
        stack.callback(write, *key, read(*key))
        write(*key, to)

    for key in PARENTS:  # a switch reads as what it inherits; with nothing to inherit, as itself
        switch(key, "none")
    for key in PRODUCTS:
        switch(key, "ieee")
    write(*PARENTS[0], "ieee")
    # The others are left alone where they inherit that: cuDNN's may be in a state that nobody can put them back to, and
    # `cudnn.allow_tf32`, which decides nothing by itself, would set them.
    for key in OTHERS:
        if read(*key) != "ieee":
            switch(key, "ieee")

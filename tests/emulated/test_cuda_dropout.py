"""csrc/kernels/launch/dropout.cu on our CUDA runtime: masks, and cards that run no other kernel."""

import pytest

from emulated.cuda.scripts import DROPOUT, RUNS_CUDA, python

pytestmark = RUNS_CUDA


def test_dropout_on_cuda_has_the_bits_of_the_cpu():
    python(DROPOUT)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("apart", [3, 4])  # with 4, neighbours are loaded and stored in pairs
def test_cards_below_8_0_drop_on_the_library_route(dtype, apart):
    python(
        f"""
card(75)
options = dict(rows=9, k=70, n=24, rank=4, dropout_p=0.25, dtype=torch.{dtype})
options |= dict(apart={apart}, between=7.0)
call = Call(**options)
_C.set_cpu_isa("library")
assert close(call.both(), Call(device=torch.device("cpu"), **options).both())
assert {{kernel_of(each) for each in record()}} == {{"dropout"}} and last_error() == 0
"""
        + """
if call.dtype in (torch.bfloat16, torch.float16):
    assert "need compute capability 8.0" in call.plan().forward.reason
"""
    )

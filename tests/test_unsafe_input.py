"""What would make a kernel read memory that is not there ends in one sentence: indices, layouts and storages."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import ConvShape, Index, LinearShape
from sparsekern.kernels.cpu import attention, norms

import sparsekern as sk
from sparsekern import ops
from sparsekern.ops import products
from sparsekern.ops.library import pack
from sparsekern.topology import Grid, balanced, build_index, conv_grid, generator_for
from tests.index_noise import calls_of, illegal, noises, survive, survive_writer
from tests.oracle import Case, check_kernels, random_case
from tests.oracle_conv2d import ConvCase, conv_case

SHAPE = ConvShape(16, 32, (3, 3), padding=(1, 1, 1, 1))
PLACES = ["row_ptr", "row_col", "row_slot", "col_ptr", "col_row", "col_slot"]


def linear_call(block: tuple[int, int], **changes: object) -> torch.Tensor:
    grid = Grid(64, 32, block)
    index = build_index(balanced(grid, 5, generator_for(0)))
    given = {"x": torch.ones(3, 32), "values": torch.ones(5, *block), "index": index} | changes
    index = given["index"](index) if callable(given["index"]) else given["index"]
    return ops.linear(given["x"], given["values"], given.get("bias"), index, grid)


def conv_call(block: tuple[int, int], **changes: object) -> torch.Tensor:
    grid = conv_grid(16, 32, (3, 3), block)
    index = build_index(balanced(grid, 5, generator_for(0)))
    given = {"x": torch.ones(2, 16, 5, 5), "values": torch.ones(5, *block), "index": index} | changes
    index = given["index"](index) if callable(given["index"]) else given["index"]
    return ops.conv2d(given["x"], given["values"], given.get("bias"), index, grid, SHAPE)


def replaced(place: str, change: object) -> object:
    return lambda index: index._replace(**{place: change(getattr(index, place))})


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], 1)[:, 0]


@pytest.fixture(params=["auto", "eager"])
def _backend(request):
    with sk.backend(request.param):
        yield


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("call", [linear_call, conv_call])
@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
@pytest.mark.parametrize("place", PLACES)
def test_an_index_is_contiguous_int32_and_long_enough(call, block, place):
    for change in (torch.Tensor.long, torch.Tensor.float, strided):
        with pytest.raises(ValueError, match=f"{place} of the index is .* it must be contiguous, torch.int32"):
            call(block, index=replaced(place, change))
    with pytest.raises(ValueError, match=r"of the index is torch.int32 of shape|the index is for"):
        call(block, index=replaced(place, lambda tensor: tensor[:-1].clone()))


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_the_ops_below_check_too(block):
    """What an exported program calls, and a backward."""
    grid = Grid(64, 32, block)
    index = build_index(balanced(grid, 5, generator_for(0)))
    lists = list(index._replace(col_slot=index.col_slot.long()))
    op, values, sizes = torch.ops.sparsekern, torch.ones(5, *block), [32, 64]
    for call in (
        lambda: op.linear(torch.ones(3, 32), values, None, lists, sizes, "auto"),
        lambda: op.linear_dx(torch.ones(3, 64), values, lists, sizes, [], "auto"),
        lambda: op.linear_dvalues(torch.ones(3, 64), torch.ones(3, 32), lists, *block, sizes, torch.float32, "auto"),
        lambda: op.linear_backward(torch.ones(3, 64), torch.ones(3, 32), values, lists, sizes, "auto"),
    ):
        with pytest.raises(ValueError, match="col_slot of the index is torch.int64"):
            call()


def test_entries_outside_the_grid_are_refused():
    def far(index: Index) -> Index:
        index.row_slot[0] = 10**9
        return index

    for call in (linear_call, conv_call):
        for block in ((1, 1), (16, 16)):
            with pytest.raises((ValueError, IndexError), match="index"):  # IndexError: where there is no native library
                call(block, index=far)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("call", [linear_call, conv_call])
def test_a_storage_that_was_resized_to_nothing(call):
    x = torch.ones(2, 16, 5, 5) if call is conv_call else torch.ones(3, 32)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has a storage of 0 bytes, too small for it"):
        call((16, 16), x=x)
    values = torch.ones(5, 16, 16)
    values.untyped_storage().resize_(100)
    with pytest.raises(ValueError, match="has a storage of 100 bytes, too small for it"):
        call((16, 16), values=values)
    images = torch.ones(2, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    x, bias = images if call is conv_call else torch.ones(3, 32), torch.ones(32 if call is conv_call else 64)
    call((16, 16), x=x, bias=bias[:1].expand_as(bias))  # of one number, and complete
    for tensor in (bias, x):
        tensor.untyped_storage().resize_(20)
        with pytest.raises(ValueError, match="has a storage of 20 bytes, too small for it"):
            call((16, 16), x=x, bias=bias)
        tensor.untyped_storage().resize_(tensor.nbytes)


@pytest.mark.parametrize("held", [0, 100])
def test_storages_that_attention_and_batch_norm_read(held: int) -> None:
    def attend(qkv: torch.Tensor) -> torch.Tensor:
        return sk.nn.qkv_attention(qkv, 2)

    def norm(*tensors: torch.Tensor) -> torch.Tensor:
        assert ops.fuses_batch_norm_relu(*tensors)
        return ops.batch_norm_relu(*tensors)[0]

    images = [torch.rand(2, 64, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    for f, inputs in (
        (attend, (torch.rand(1, 9, 192),)),
        (norm, (images[0], torch.rand(64), torch.rand(64), images[1])),
    ):
        for tensor in inputs:
            tensor.requires_grad_()
        y = f(*inputs)
        dy = torch.rand_like(y)
        for tensor, call in (
            *((tensor, lambda f=f, inputs=inputs: f(*inputs)) for tensor in inputs),
            *(
                (tensor, lambda y=y, dy=dy, x=inputs[0]: torch.autograd.grad(y, x, dy, retain_graph=True))
                for tensor in (dy, *inputs[:3])
            ),
        ):
            tensor.untyped_storage().resize_(held)
            with pytest.raises(ValueError, match=f"has a storage of {held} bytes, too small for it"):
                call()
            tensor.untyped_storage().resize_(tensor.nbytes)


def test_storages_of_views_and_without_autograd():
    view = torch.rand(2 * 3456)[3456:].view(2, 9, 192)
    view.untyped_storage().resize_(3456 * 4)
    for tensor in (view, cut := torch.rand(2, 9, 192)):
        cut.untyped_storage().resize_(100)
        with torch.inference_mode(), pytest.raises(ValueError, match="bytes, too small for it"):
            sk.nn.qkv_attention(tensor, 1)


def test_the_attention_ops_refuse_what_their_kernels_cannot_read():
    forward, backward = torch.ops.sparsekern.qkv_attention, torch.ops.sparsekern.qkv_attention_backward
    qkv = torch.rand(3, 40, 96)
    y, stats = forward(qkv, 1, False)
    for bad, heads in ((qkv[..., :48], 1), (qkv.double(), 1), (qkv, 1000), (qkv, 0), (qkv[:, :0], 1), (qkv[0], 1)):
        with pytest.raises(ValueError, match="the op takes float32") as error:
            forward(bad, heads, False)
        assert error.value.parameter == "qkv"
    for dy, saved in ((y[:1], stats), (y, stats[:1]), (y.double(), stats), (y, stats.double())):
        with pytest.raises(ValueError, match="dy and stats are"):
            backward(dy, qkv, saved, 1, False)


def test_the_library_itself_refuses_tensors_without_storage() -> None:
    qkv, x, one = (
        torch.ones(1, 9, 96),
        torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.ones(3),
    )
    y, stats = attention.forward(qkv, 1, False)
    _, moments = norms.forward(x, one, one, None, 1e-5)
    freed_qkv, freed_y, freed_x = (torch.ones_like(t) for t in (qkv, y, x))
    for tensor in (freed_qkv, freed_y, freed_x):
        tensor.untyped_storage().resize_(0)
    for call in (
        lambda: attention.forward(freed_qkv, 1, False),
        lambda: attention.backward(freed_y, qkv, stats, 1, False),
        lambda: norms.forward(freed_x, one, one, None, 1e-5),
        lambda: norms.backward(freed_x, x, None, one, one, moments, 1e-5),
        lambda: norms.backward(x, x, freed_x, one, one, moments, 1e-5),
    ):
        with pytest.raises(ValueError, match="resized to nothing"):
            call()


def test_an_index_without_storage():
    def freed(index: Index) -> Index:
        index.row_slot.untyped_storage().resize_(0)
        return index

    for call in (linear_call, conv_call):
        with pytest.raises(ValueError, match="resized to nothing"):
            call((16, 16), index=freed)


LAYOUTS = {
    "sparse": lambda x: x.to_sparse(),
    "CSR": lambda x: x.to_sparse_csr() if x.dim() == 2 else x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
}


@pytest.mark.parametrize("call", [linear_call, conv_call])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
def test_other_layouts_are_one_sentence(call, layout):
    if layout == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no MKL-DNN")
    x = LAYOUTS[layout](torch.ones(2, 16, 5, 5) if call is conv_call else torch.ones(3, 32))
    with pytest.raises(
        TypeError, match=r"input is a .* tensor; a sparse layer takes dense ones: convert it with \.to_"
    ):
        call((16, 16), x=x)
    with pytest.raises(TypeError, match="values and bias are torch.sparse_coo and None tensors; they must be dense"):
        call((16, 16), values=torch.ones(5, 16, 16).to_sparse())


def test_directions_of_a_sketch_have_the_length_of_the_layer():
    grid = Grid(64, 32, (16, 16))
    probe = ops.Probe.sketch(grid, torch.ones(2, 64), torch.ones(2, 32))
    for args in ((torch.ones(2, 60), torch.ones(2, 32)), (torch.ones(2, 64), torch.ones(3, 32))):
        with pytest.raises(ValueError, match=r"directions .* have shapes .*; they must be \(r, 64\) and \(r, 32\)"):
            ops.sketch(torch.ones(3, 64), torch.ones(3, 32), *args, 16, 16, "cpu")
    assert probe.tensor.shape == (2, 4, 2)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_an_empty_list_may_arrive_as_none(name):
    """As AOTInductor hands it to the kernel of the Autograd key."""
    family = products.LINEAR if name == "linear" else products.CONV2D
    block, kernel = (16, 16), family._forward_at_autograd
    grid = Grid(64, 32, block) if name == "linear" else conv_grid(16, 32, (3, 3), block)
    lists = list(build_index(balanced(grid, 5, generator_for(0))))
    x = torch.ones(3, 32) if name == "linear" else torch.ones(2, 16, 5, 5)
    sizes = pack(LinearShape(32, 64) if name == "linear" else SHAPE)
    values = torch.ones(5, *block, requires_grad=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = kernel(x, values, None, lists, sizes, "auto", None, "", None)
            assert torch.equal(y, kernel(x, values, None, lists, sizes, "auto", None, "", []))


# The native kernels alone, on every instruction set: what is illegal is refused, and what is legal is still computed.
# That nothing outside the tensors was touched is for the sanitizers to say: tests/sanitize_cpu.py makes the same calls.


def linear_case(block: tuple[int, int], tokens: int, dtype: torch.dtype = torch.float32) -> Case:
    given = {"rows": 7, "cols": 9, "blocks": 30, "free": 4, "dtype": dtype, "tokens": tokens, "bias": True}
    return random_case(3, block=block, x_layout="contiguous", dy_layout="contiguous", **given)


def conv2d_case(
    block: tuple[int, int], groups: int = 1, stride: int = 1, dtype: torch.dtype = torch.float32
) -> ConvCase:
    given = {"kernel": (3, 3), "stride": (stride, stride), "dilation": (1, 1), "padding": (1, 1, 1, 1), "images": 2}
    given |= {"height": 6, "width": 7, "groups": groups, "group_in": 2 * block[1] + 1, "group_out": 3 * block[0]}
    return conv_case(5, block=block, dtype=dtype, blocks=9, **given)


LINEAR = [((1, 1), 3), ((1, 1), 40), ((16, 32), 2), ((16, 32), 40), ((16, 32), 40, torch.bfloat16)]
CONV = [((1, 1), 1, 1), ((1, 1), 3, 2), ((16, 16), 1, 1), ((16, 16), 2, 2), ((16, 32), 1, 1, torch.bfloat16)]


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(
    ("make", "given"), [*((linear_case, given) for given in LINEAR), *((conv2d_case, given) for given in CONV)]
)
def test_native_kernels_refuse_what_is_not_in_the_grid(make, given):
    case = make(*given)
    index, block = case.index, case.grid.block
    calls = calls_of(case)
    for name, (call, lists) in calls.items():
        for number in lists:
            for seed, wrong in enumerate(illegal(index, number, block, 0)):
                assert survive(call, wrong), (name, number, seed)
        for wrong in noises(index, 1):
            survive(call, wrong)
    check_kernels(cpu, case)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_another_thread_may_write_into_an_index_meanwhile(block):
    case, conv = linear_case(block, 40), conv2d_case(block, 2)
    survive_writer(calls_of(case), case.index, 10)
    survive_writer(calls_of(conv), conv.index, 10)


@pytest.mark.usefixtures("instructions")
def test_native_kernels_refuse_an_index_of_another_grid():
    case, larger = linear_case((16, 32), 40), random_case(3, block=(16, 32), rows=8, cols=9, blocks=30, free=4)
    assert all(survive(call, larger.index) for call, _ in calls_of(case).values())

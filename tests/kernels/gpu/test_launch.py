"""What the launchers share, and why the backend refuses what it does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.gpu.launch import (
    MOST_PIXELS,
    aligned,
    aligned_images,
    aligned_rows,
    alignment,
    arch,
    dot_precision,
    interpreted,
    multiprocessors,
    on_default_stream,
    on_device_of,
)

from tests.device import DEVICE, INTERPRETED, interpreted_only
from tests.oracle import X_LAYOUTS, lay_out, moved

CPU = torch.device("cpu")
HERE = torch.device(DEVICE)


# Precision.


@pytest.fixture
def precision() -> Iterator[None]:
    """Restore torch's settings, each by its own way: reading the old one raises once the new one differs."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(("asked", "got"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_the_precision_of_float32_follows_the_old_setting(asked: str, got: str) -> None:
    torch.set_float32_matmul_precision(asked)

    assert dot_precision(torch.float32) == got


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("asked", ["ieee", "tf32"])
def test_the_precision_of_float32_follows_the_new_setting(asked: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = asked

    assert dot_precision(torch.float32) == asked


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("asked", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_depend_on_it(dtype: torch.dtype, asked: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = asked

    assert dot_precision(dtype) == "tf32"


def test_by_default_float32_is_not_rounded() -> None:
    assert dot_precision(torch.float32) == "ieee"


# Rows.


def test_alignment_is_16_bytes() -> None:
    assert [alignment(d) for d in (torch.float16, torch.bfloat16, torch.float32)] == [8, 8, 4]


@pytest.mark.parametrize(("dtype", "features"), [(torch.float16, 24), (torch.float32, 20)])
def test_aligned_rows_are_taken_as_they_are(dtype: torch.dtype, features: int) -> None:
    x = torch.ones(3, features, dtype=dtype, device=DEVICE)

    assert aligned_rows(x) is x
    assert aligned_rows(x[::2]).data_ptr() == x.data_ptr()
    assert aligned_rows(x[:1].expand(5, features)).stride(0) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("features", [16, 13, 1])
@pytest.mark.parametrize("layout", [*X_LAYOUTS, "one row expanded", "one number expanded"])
def test_any_rows_become_aligned_ones_filled_up_with_zeros(layout: str, features: int, dtype: torch.dtype) -> None:
    x = moved(lay_out(torch.arange(5.0 * features).view(5, features).to(dtype), layout), DEVICE)

    rows, align = aligned_rows(x), 16 // dtype.itemsize

    assert rows.shape[1] % align == 0 and rows.shape[1] - features < align
    assert rows.stride(1) == 1 and rows.stride(0) % align == 0 and rows.data_ptr() % 16 == 0
    assert torch.equal(rows[:, :features], x)
    assert not rows[:, features:].any()


@pytest.mark.parametrize("start", range(9))
def test_a_start_inside_16_bytes_is_copied(start: int) -> None:
    x = torch.arange(64, device=DEVICE).half()[start : start + 48].view(3, 16)

    rows = aligned_rows(x)

    assert rows.data_ptr() % 16 == 0
    assert (rows is x) == (start % 8 == 0)
    assert torch.equal(rows, x)


def test_the_stride_of_a_single_row_means_nothing() -> None:
    x = torch.arange(16.0, device=DEVICE).as_strided((1, 16), (7, 1))

    assert aligned_rows(x) is x


def test_a_feature_stride_of_zero_is_copied() -> None:
    x = torch.ones(4, 1, device=DEVICE).expand(4, 8)

    assert aligned_rows(x).stride(1) == 1


@pytest.mark.parametrize("start", range(9))
def test_values_that_start_inside_16_bytes_are_copied(start: int) -> None:
    """Views into a flat parameter: read element by element otherwise."""
    flat = torch.arange(9 + 2 * 256, device=DEVICE).half()
    values = flat[start : start + 2 * 256].view(2, 16, 16)

    found = aligned(values)

    assert found.data_ptr() % 16 == 0 and found.is_contiguous() and torch.equal(found, values)
    assert (found is values) == (start % 8 == 0)
    assert aligned(values.transpose(1, 2)).is_contiguous()


@interpreted_only
def test_where_a_list_lies_in_its_memory_compiles_nothing_anew() -> None:
    """It changes with the number of blocks. Only tensors of numbers are specialised."""
    from sparsekern.kernels.gpu import conv2d_multiply, conv2d_outer, multiply, outer

    for kernel in (
        multiply.multiply_kernel, multiply.few_tokens_kernel, multiply.multiply_tma_kernel, outer.outer_kernel,
        conv2d_multiply.conv2d_multiply_kernel, conv2d_multiply.lists_kernel, conv2d_outer.conv2d_outer_kernel,
    ):  # fmt: skip
        pointers = {name for name in inspect.signature(kernel.fn).parameters if name.endswith("_ptr")}
        anywhere = set(kernel.kwargs["do_not_specialize_on_alignment"])
        assert pointers - anywhere <= {"x_ptr", "dy_ptr", "values_ptr", "y_ptr", "out_ptr"} and anywhere <= pointers


# The device.


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_interpreted(value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreted() is expected
    monkeypatch.delenv("TRITON_INTERPRET")
    assert interpreted() is False


def test_the_interpreter_stands_for_one_device() -> None:
    assert arch(CPU) == "sm_90"
    assert multiprocessors(CPU) == 132
    with on_device_of(torch.ones(1)):
        pass


# Why not.


def test_what_it_runs() -> None:
    for dtype in gpu.DTYPES:
        if HERE.type == "cpu" and dtype == torch.bfloat16:
            continue
        for block in ((16, 16), (16, 128), (64, 32)):
            assert gpu.why_not("linear", HERE, dtype, block) is None
            assert gpu.why_not("conv2d", HERE, dtype, block) is None


@pytest.mark.parametrize(
    ("op", "device", "dtype", "block", "reason"),
    [
        ("attention", HERE, torch.float16, (16, 16), "it has no kernels for attention"),
        ("linear", torch.device("meta"), torch.float16, (16, 16), "the tensors are on meta; it needs an NVIDIA GPU"),
        pytest.param(*("linear", CPU, torch.bfloat16, (16, 16), "multiplies bfloat16 wrongly"), marks=interpreted_only),
        ("linear", HERE, torch.float64, (16, 16), "the dtype is torch.float64; it has torch.float16, torch.bfloat16"),
        ("linear", HERE, torch.float16, (1, 1), "blocks are 1x1; it has sides 16, 32, 64, 128"),
        ("linear", HERE, torch.float16, (16, 24), "blocks are 16x24; it has sides"),
        ("linear", HERE, torch.float16, (256, 16), "blocks are 256x16; it has sides"),
    ],
)
def test_reasons(op: str, device: torch.device, dtype: torch.dtype, block: tuple[int, int], reason: str) -> None:
    assert reason in str(gpu.why_not(op, device, dtype, block))


@pytest.fixture
def asked_anew() -> Iterator[None]:
    gpu._why_not_here.cache_clear()
    yield
    gpu._why_not_here.cache_clear()


@pytest.mark.usefixtures("asked_anew")
class TestHere:
    """Reasons that lie in the machine."""

    def test_no_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        reason = gpu.why_not("linear", CPU, torch.float16, (16, 16))
        assert reason == "the tensors are on cpu; it needs an NVIDIA GPU (or TRITON_INTERPRET=1, for tests)"

    def test_no_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "find_spec", lambda name: None)
        reason = gpu.why_not("linear", HERE, torch.float16, (16, 16))
        assert reason == "Triton is not installed; pip install triton"

    def test_another_vendor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "hip", "6.2")
        reason = gpu.why_not("linear", torch.device("cuda", 0), torch.float16, (16, 16))
        assert reason == "it was never run on ROCm"

    @pytest.mark.parametrize(
        ("capability", "works"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)]
    )
    def test_the_age_of_the_gpu(
        self, capability: tuple[int, int], works: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old T4")
        reason = gpu.why_not("linear", torch.device("cuda", 0), torch.float16, (16, 16))
        assert reason == (None if works else "Old T4 is sm_75; it needs sm_80 or newer")


@interpreted_only
def test_the_tests_run_where_they_say() -> None:
    assert INTERPRETED and interpreted() and not torch.cuda.is_available()


# Images.


@pytest.mark.parametrize(("channels", "groups"), [(16, 1), (16, 2), (24, 3)])
def test_aligned_images_are_not_copied(channels: int, groups: int) -> None:
    x = torch.randn(2, 3, 4, channels, dtype=torch.float32).half().permute(0, 3, 1, 2)

    images = aligned_images(x, groups)

    assert images.data_ptr() == x.data_ptr() and images.shape == (2, 3, 4, groups, channels // groups)


@pytest.mark.parametrize(("channels", "groups", "filled"), [(12, 1, 16), (16, 4, 8), (3, 3, 8)])
def test_the_channels_of_each_group_are_filled_up_with_zeros(channels: int, groups: int, filled: int) -> None:
    x = torch.randn(2, 3, 4, channels).half().permute(0, 3, 1, 2)

    images = aligned_images(x, groups)

    assert images.is_contiguous() and images.shape == (2, 3, 4, groups, filled)
    assert torch.equal(images[..., : channels // groups].flatten(3), x.permute(0, 2, 3, 1))
    assert not images[..., channels // groups :].any()


def test_images_that_start_inside_16_bytes_are_copied() -> None:
    x = torch.randn(2 * 3 * 4 * 16 + 1)[1:].view(2, 3, 4, 16).permute(0, 3, 1, 2)

    images = aligned_images(x, 1)

    assert images.data_ptr() % 16 == 0 and torch.equal(images.flatten(3), x.permute(0, 2, 3, 1))


def test_more_pixels_than_an_int32_counts_are_refused() -> None:
    x = torch.zeros(1, 1, 1, 16).expand(2**15, 2**15, 2, 16).permute(0, 3, 1, 2)

    with pytest.raises(NotImplementedError, match=f"2147483648 pixels in a call; .* fewer than {MOST_PIXELS}"):
        aligned_images(x, 1)


def test_the_default_stream_is_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_0, gpu_1 = torch.device("cuda", 0), torch.device("cuda", 1)
    assert on_default_stream(CPU)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: (device, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: (device, device.index))
    assert on_default_stream(gpu_0) and not on_default_stream(gpu_1)

# SPDX-License-Identifier: Apache-2.0
"""The extension's leap, for any thread count and on every instruction set."""

import pytest
import torch

from gradsampler.ops import native
from support.leaps import F32, F64, I32, I64, Case, Leaps, kinds
from support.native_devices import DEVICES

pytestmark = pytest.mark.skipif(
    native.available() is not None, reason=f"extension: {native.available()}"
)


@pytest.fixture
def leap():
    return native.leap


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def truncates():
    return False


@pytest.fixture(autouse=True)
def _restored():
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    native.use_isa(native.isas()[0])
    native._module.set_cache_bytes(32 << 20)


class TestExtension(Leaps):
    @kinds
    @pytest.mark.parametrize("isa", native.isas())
    def test_every_instruction_set(self, leap, isa, kind):
        native.use_isa(isa)
        for integer, dtypes in ((I32, "f32"), (I64, "f32 bf16"), (I32, "f64"), (I64, "f64 to f32")):
            Case("cpu", (2, 1531), kind, integer, dtypes).holds(leap)

    @pytest.mark.parametrize("isa", native.isas())
    def test_edges_on_every_instruction_set(self, leap, isa):
        native.use_isa(isa)
        for integer in (I32, I64):
            for dtype in (F32, F64):
                self.test_halves_go_to_the_even_number(leap, "cpu", dtype, integer)
                self.test_what_leaves_the_range_is_flagged_and_undone(leap, "cpu", dtype, integer)

    @pytest.mark.parametrize("kind", ["sincos", "mixture"])
    def test_threads_and_stores_around_the_cache_change_nothing(self, leap, kind):
        case = Case("cpu", (3, 50_021), kind, I64, "f32 bf16")
        torch.set_num_threads(1)
        alone = case.holds(leap)
        native._module.set_cache_bytes(0)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(case.holds(leap), alone)

    def test_one_thread_of_many_raises_the_flag(self, leap):
        case = Case("cpu", (3, 50_021))
        case.terms[0][1, 17] = torch.nan
        overflow = torch.zeros(1, dtype=I32)
        torch.set_num_threads(4)
        case.leap(leap, case.start, 1, overflow)
        assert overflow.item() == 1

    @pytest.mark.parametrize("count", [0, 7])
    def test_counts_of_terms_that_the_loops_do_not_know(self, leap, count):
        case = Case("cpu", count=min(count, 6), dtypes="f64")
        if count == 7:
            case.terms.append(case.z0)
            case.coefs.append(3e5)
        case.holds(leap)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"carried": torch.zeros(2, 9)}, "leap: carried must have dtype int32 or int64, got F"),
            ({"carried": torch.zeros(2, 8, dtype=I32)},
             r"leap: carried must have shape \[2, 9\], got \[2, 8\]"),
            ({"carried": torch.zeros(1, 9, dtype=I64).expand(2, 9)},
             "leap: carried must have no stride of 0"),
            ({"overflow": torch.zeros(2, dtype=I32)},
             "leap: overflow must hold 1 element of dtype int32, got 2 of dtype Int"),
            ({"overflow": torch.zeros(1, dtype=I64)}, "leap: overflow must hold 1 element"),
            ({"coefs": [1.0, 2.0]}, "leap: coefs must hold 1 numbers, got 2"),
        ],
    )  # fmt: skip
    def test_errors_name_argument_expected_and_got(self, leap, change, message):
        call = {
            "carried": torch.zeros(2, 9, dtype=I32),
            "terms": [torch.zeros(2, 9)],
            "coefs": [1.0],
            "overflow": torch.zeros(1, dtype=I32),
            **change,
        }
        with pytest.raises(RuntimeError, match=message):
            leap(**call, sign=1, scale=1.0, out_dtype=F32)

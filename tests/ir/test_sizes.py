"""Size polynomials against plain numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from graphprune.ir.axes import Axis, Pin, concat, pin, product
from graphprune.ir.sizes import Polynomial, disagreement

AXES = [Axis(size) for size in (4, 6, 8)]


@st.composite
def polynomials(draw: st.DrawFn) -> Polynomial:
    terms = {}
    for _ in range(draw(st.integers(0, 4))):
        monomial = tuple(sorted(draw(st.lists(st.sampled_from(AXES), max_size=3)), key=lambda a: a.serial))
        terms[monomial] = draw(st.integers(-5, 5))
    return Polynomial(terms)


def values() -> st.SearchStrategy:
    return st.fixed_dictionaries({axis: st.integers(1, 9) for axis in AXES}).map(lambda d: d.__getitem__)


@given(polynomials(), polynomials(), values())
def test_arithmetic_is_arithmetic_of_numbers(a: Polynomial, b: Polynomial, size) -> None:
    assert (a + b).value(size) == a.value(size) + b.value(size)
    assert (a - b).value(size) == a.value(size) - b.value(size)
    assert (a * b).value(size) == a.value(size) * b.value(size)


@given(polynomials(), polynomials(), polynomials())
def test_equality_is_that_of_rings(a: Polynomial, b: Polynomial, c: Polynomial) -> None:
    assert a + b == b + a
    assert a * b == b * a
    assert a * (b + c) == a * b + a * c
    assert a - a == Polynomial.constant(0)
    assert hash(a + b) == hash(b + a)


@given(polynomials(), st.lists(st.sampled_from(AXES), max_size=2), st.integers(1, 4))
def test_division_undoes_multiplication(a: Polynomial, axes: list[Axis], number: int) -> None:
    divisor = Polynomial.constant(number)
    for axis in axes:
        divisor = divisor * Polynomial.of(axis)
    assert (a * divisor).divide(divisor) == a


def test_division_that_leaves_a_rest_is_refused() -> None:
    heads, width, _ = (Polynomial.of(axis) for axis in AXES)
    assert (heads * width + Polynomial.constant(1)).divide(heads) is None
    assert Polynomial.constant(7).divide(Polynomial.constant(2)) is None
    assert heads.divide(heads + width) is None


def test_the_size_of_an_axis() -> None:
    heads, a, b = Axis(4), Axis(3), Axis(5)
    axis = product([heads, concat([a, b])])
    new = {heads: 2, a: 1, b: 4}
    assert Polynomial.of(axis).value(new.__getitem__) == 2 * (1 + 4)
    assert Polynomial.of(axis).symbols() == {heads, a, b}


def test_a_pinned_leaf_is_a_number() -> None:
    heads, width = Axis(4), Axis(3)
    pin(width, Pin("fixed"))
    assert Polynomial.of(product([heads, width])) == Polynomial({(heads,): 3})
    assert Polynomial.of(width) == Polynomial.constant(3)


def test_common_factors_do_not_disagree() -> None:
    heads, qk, v = AXES
    assert disagreement(Polynomial.of(product([heads, qk])), Polynomial.of(product([heads, v]))) == {qk, v}


def test_equal_sizes_do_not_disagree() -> None:
    heads, qk, _ = AXES
    one, other = Polynomial.of(product([heads, qk])), Polynomial.of(qk) * Polynomial.of(heads)
    assert disagreement(one, other) == set()


def test_a_number_against_a_symbol_disagrees() -> None:
    heads, qk, _ = AXES
    assert disagreement(Polynomial.of(heads), Polynomial.constant(4)) == {heads}
    assert disagreement(Polynomial.of(product([heads, qk])), Polynomial({(heads,): 6})) == {qk}


@given(polynomials(), polynomials(), values())
def test_without_the_disagreeing_leaves_sizes_agree_at_the_old_ones(a: Polynomial, b: Polynomial, size) -> None:
    """Whatever happens to leaves that do not disagree, a zero difference stays zero."""
    blamed = disagreement(a, b)

    def fixed(axis: Axis) -> int:
        return axis.size

    def mixed(axis: Axis) -> int:
        return axis.size if axis in blamed else size(axis)

    if a.value(fixed) == b.value(fixed):
        assert a.value(mixed) == b.value(mixed)

"""
Whether an answer is the gold answer. math-verify decides where letters are in it; numbers are compared here, by value, and
so is the kind of list: a pair is no list of two, and an interval no pair.
"""

import re
from decimal import Decimal

from math_verify import verify
from sympy import (
    Add,
    E,
    Eq,
    Expr,
    FiniteSet,
    Float,
    I,
    Intersection,
    Interval,
    MatrixBase,
    Mul,
    Pow,
    Rational,
    S,
    Set,
    Symbol,
    Tuple,
    UnevaluatedExpr,
    Union,
    oo,
    simplify,
)
from sympy import And as SympyAnd
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational


DIGITS = 5  # of a rounded number
EXACT, FLOAT = 1e-20, 1e-14  # relative difference below which two numbers, worked out to 40 digits, are one


# --- numbers ---


def _worked_out(value: Expr) -> Expr:
    """Symbols by name only, and `i` as the imaginary unit: math-verify has several of each."""
    names = {symbol: I if symbol.name == "i" else Symbol(symbol.name, real=True) for symbol in value.atoms(Symbol)}
    return value.xreplace({symbol: new for symbol, new in names.items() if symbol != new})


def _decimal(value: Expr) -> Decimal | None:
    """A literal decimal number, also with a sign."""
    value = value.args[1] if isinstance(value, Mul) and value.args[0] == -1 and len(value.args) == 2 else value
    if isinstance(value, Mul) and value.has(UnevaluatedExpr) and isinstance(value.args[0], Float):  # percent
        value = value.doit()
    return Decimal(repr(float(value))) if isinstance(value, Float) else None


def _has_decimals(value: Expr) -> bool:
    """Whether a finite decimal is the number itself: 1/8 and 3.14, not 1/3 and pi."""
    if not isinstance(value, Rational):
        return value.has(Float)
    rest = value.q
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _same_number(gold: Expr, found: Expr) -> bool:
    """By value, to 20 digits. Of a number without a finite decimal, five digits will do; 30 % is 30 and 0.3."""
    if gold == found:
        return True
    percents = gold.has(UnevaluatedExpr), found.has(UnevaluatedExpr)
    scales = {(True, False): (1, Rational(1, 100)), (False, True): (1, 100)}.get(percents, (1,))
    literals = _decimal(found), _decimal(gold)
    gold, found = gold.doit(), found.doit()
    if isinstance(gold, Rational) and isinstance(found, Rational) and not any(percents):
        return gold == found
    for scale in scales:
        one, other = gold.evalf(40), (found * scale).evalf(40)
        if not (one.is_finite and other.is_finite):
            return False
        if gold.is_zero or found.is_zero:
            return (gold - found).equals(0) is True
        difference = abs((one - other).evalf(40))
        if difference <= abs(one) * (FLOAT if gold.has(Float) or found.has(Float) else EXACT):
            return True
        for literal, exact in zip(literals, (gold, found), strict=True):
            if literal is not None and not _has_decimals(exact):
                _, digits, exponent = literal.as_tuple()
                unit = Rational(10) ** exponent  # rounded, or cut off
                is_near = difference <= unit / 2 or (difference < unit and abs(Rational(str(literal))) < abs(exact))
                if len(digits) >= DIGITS and exponent < 0 and is_near:
                    return True
    return False


# --- everything else ---


def items_of(value: object) -> list | None:
    """The elements of a list or set; `None` for anything else."""
    return list(getattr(value, "_unsorted_args", value.args)) if isinstance(value, FiniteSet) else None


def _ordered(value: object) -> tuple | None:
    """The parts of a pair, tuple or interval, and its brackets."""
    if isinstance(value, Interval):
        return (bool(value.left_open or value.start == -oo), bool(value.right_open or value.end == oo)), [
            value.start,
            value.end,
        ]
    return ((True, True), list(value.args)) if isinstance(value, Tuple) else None


def is_name(side: object) -> bool:
    """Whether the left side of an equation only names a value: x, f(2), a + b, AB, x/y; not 3x, x^2 or -x."""
    if isinstance(side, Tuple | Interval):
        return all(isinstance(part, Symbol) for part in _ordered(side)[1])
    if isinstance(side, Symbol | AppliedUndef):
        return True
    if isinstance(side, Add):
        return all(
            is_name(part.args[1] if isinstance(part, Mul) and part.args[0] == -1 and len(part.args) == 2 else part)
            for part in side.args
        ) and any(isinstance(part, Symbol | AppliedUndef) for part in side.args)
    if isinstance(side, Mul):
        return all(
            is_name(part) or (isinstance(part, Pow) and part.exp == -1 and is_name(part.base)) for part in side.args
        )
    return side is E


def is_number(value: object) -> bool:
    return (
        isinstance(value, Expr)
        and not value.has(AppliedUndef)
        and not any(symbol.name != "i" for symbol in value.free_symbols)
    )


def chain_of(value: object) -> list | None:
    """The sides of an equation or of a chain of them; `None` for anything else."""
    relations = value._unsorted_args if isinstance(value, SympyAnd) and hasattr(value, "_unsorted_args") else [value]
    if not all(isinstance(relation, Eq) for relation in relations):
        return None
    return [relations[0].lhs, *(relation.rhs for relation in relations)]


def named_values(value: object) -> dict | None:
    """The values of "x = 1, y = 2" by their names, if the names are in order; `None` for anything else."""
    chains = [chain_of(item) for item in items_of(value) or []]
    named = {str(chain[0]): chain[-1] for chain in chains if chain and isinstance(chain[0], Symbol)}
    return named if len(named) == len(chains) and list(named) == sorted(named) else None


def _is_solved(value: object) -> bool:
    """Whether inequalities bound a variable by numbers: 1 < x < 2, not 2x + 3 < 7."""
    relations = getattr(value, "_unsorted_args", None) or (
        [value] if isinstance(value, Relational) else list(value.args)
    )
    sides = [side for relation in relations for side in (relation.lhs, relation.rhs)]
    return all(is_number(side) or isinstance(side, Symbol | AppliedUndef) for side in sides) and any(
        isinstance(side, Symbol | AppliedUndef) for side in sides
    )


def _is_inequality(value: object) -> bool:
    relations = value._unsorted_args if isinstance(value, SympyAnd) and hasattr(value, "_unsorted_args") else [value]
    return all(isinstance(relation, Relational) and not isinstance(relation, Eq) for relation in relations)


def is_set(value: object) -> bool:
    """Whether it is a set of numbers that is no list: an interval or what is made of them."""
    return isinstance(value, Set) and not isinstance(value, FiniteSet)


def as_set(value: object, is_union: bool) -> object:
    """Solved inequalities as the set of numbers that they leave; anything else as it is."""
    parts = items_of(value) or [value]
    if not all(_is_inequality(part) and _is_solved(part) for part in parts):
        return value
    variables = {side for part in parts for side in part.free_symbols}
    if len(variables) > 1:
        return value
    sets, variable = [], Symbol("x", real=True)
    for part in parts:
        for relation in getattr(part, "_unsorted_args", [part]):
            sides = [
                variable if isinstance(side, Symbol | AppliedUndef) else side.doit()
                for side in (relation.lhs, relation.rhs)
            ]
            bound = relation.func(*sides)
            sets.append(S.Reals if bound is S.true else bound.as_set())
        if len(sets) > 1 and hasattr(part, "_unsorted_args"):
            sets[-2:] = [Intersection(*sets[-2:])]
    return Union(*sets) if is_union else Intersection(*sets)


def union_of(value: object) -> object:
    """A list of intervals as the set of the numbers in them; anything else as it is."""
    parts = items_of(value) or [value]
    return Union(*parts) if all(map(is_set, parts)) else value


def same(gold: object, found: object) -> bool:
    """Whether two parsed answers are equal, in their kind and in each of their parts."""
    if isinstance(gold, Relational | SympyAnd) and isinstance(found, Relational | SympyAnd):
        return _same_relation(gold, found)
    gold_chain, found_chain = chain_of(gold), chain_of(found)
    if found_chain and not gold_chain:
        found = found_chain[-1]
        if not is_consistent(found_chain):
            return False
    elif gold_chain and not found_chain:
        gold = gold_chain[-1] if is_name(gold_chain[0]) else gold
    gold_items, found_items = items_of(gold), items_of(found)
    gold_parts, found_parts = _ordered(gold), _ordered(found)
    if gold_items is None and found_items is not None and len(found_items) == 1:
        return same(gold, found_items[0])
    if found_items is None and gold_items is not None and len(gold_items) == 1:
        return same(gold_items[0], found)
    if gold_items is not None and found_items is not None:
        named = named_values(gold) or {}
        if len({name[0] for name in named}) == len(named) > 1 and not any(map(chain_of, found_items)):
            gold_items = list(named.values())  # 1, 2 for a = 1, b = 2: in the order of the names
            return len(gold_items) == len(found_items) and all(map(same, gold_items, found_items))
        return _same_list(gold_items, found_items)
    if gold_parts is not None and (named := named_values(found)):  # x = 1, y = 2 for (1, 2)
        found_parts = (True, True), list(named.values())
    elif found_parts is not None and (named := named_values(gold)):
        gold_parts = (True, True), list(named.values())
    if gold_parts is not None and found_parts is not None:
        return (
            gold_parts[0] == found_parts[0]
            and len(gold_parts[1]) == len(found_parts[1])
            and all(map(same, gold_parts[1], found_parts[1]))
        )
    if gold_items is not None or found_items is not None or gold_parts is not None or found_parts is not None:
        if isinstance(gold, Set) and isinstance(found, Set) and gold_items is None and found_items is None:
            return verify([gold], [found], timeout_seconds=None)
        return False
    if isinstance(gold, MatrixBase) and isinstance(found, MatrixBase):
        return gold.shape == found.shape and all(map(same, gold, found))
    if is_number(gold) and is_number(found):
        return _same_number(_worked_out(gold), _worked_out(found))
    if isinstance(gold, Expr) and isinstance(found, Expr):
        gold, found = _worked_out(gold), _worked_out(found)
        return _agree_at_a_point(gold, found) and verify([gold], [found], timeout_seconds=None)
    return verify([gold], [found], timeout_seconds=None)


def _same_list(gold: list, found: list) -> bool:
    """In any order, each as often as it is there."""
    rest = list(found)
    for one in gold:
        match = next((index for index, other in enumerate(rest) if same(one, other)), None)
        if match is None:
            return False
        rest.pop(match)
    return not rest


def _same_relation(gold: object, found: object) -> bool:
    gold_chain, found_chain = chain_of(gold), chain_of(found)
    if (gold_chain is None) != (found_chain is None):
        return False
    if gold_chain is None:
        if _is_solved(gold) and not _is_solved(found):
            return False
        return verify([gold], [found], timeout_seconds=None)
    if not is_consistent(found_chain):
        return False
    name, found_name = str(gold_chain[0]), str(found_chain[0])
    if is_name(gold_chain[0]) and found_name in (name, re.sub(r"_\{?\d\}?$", "", name)):  # x = 1 for x_1 = 1
        return same(gold_chain[-1], found_chain[-1])
    if is_number(gold_chain[-1]) and isinstance(gold_chain[0], Symbol | AppliedUndef):  # x = 5 is not 2x = 10
        return str(gold_chain[0]) == str(found_chain[-1]) and same(gold_chain[-1], found_chain[0])
    one, other = (_worked_out(chain[0] - chain[-1]) for chain in (gold_chain, found_chain))
    if one.free_symbols != other.free_symbols or not one.free_symbols:
        return False
    ratio = simplify(one / other)
    return bool(ratio.is_number and ratio.is_finite and not ratio.is_zero) or verify(
        [gold], [found], timeout_seconds=None
    )


def is_consistent(chain: list) -> bool:
    """Whether the numbers of a chain are one number: not "3 = 4", of which math-verify takes the 4."""
    numbers = [side for side in chain if is_number(side)]
    return all(_same_number(_worked_out(numbers[-1]), _worked_out(number)) for number in numbers[:-1])


def _agree_at_a_point(gold: Expr, found: Expr) -> bool:
    """Whether two expressions have one value where their letters have some: math-verify takes all small numbers for 0."""
    if gold.has(AppliedUndef) or found.has(AppliedUndef) or gold.is_Symbol or found.is_Symbol:
        return True
    names = sorted(gold.free_symbols | found.free_symbols, key=str)
    point = {name: Rational(37 + 12 * index, 29) for index, name in enumerate(names)}
    one, other = (
        complex(value.subs(point).evalf()) if value.free_symbols else complex(value.evalf()) for value in (gold, found)
    )
    return abs(one - other) <= 1e-8 * max(abs(one), abs(other))

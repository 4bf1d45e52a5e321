"""`where`: an expression over attributes, as text, and the rows of a shard for which it is true. No Ray.

    class == 'cat' and year >= 2024
    owner in ['ann', 'bob'] or not is_null(tag)
    date >= '2026-01-01' and starts_with(path, 'a/')

Of a column of lists, such as the classes of a row, == and in ask whether a value of the list is so. The text is parsed
as a Python expression, of which only the forms below count; nothing in it is ever run.
"""

from __future__ import annotations

import ast
import datetime
import decimal
import io
import keyword
import operator
import tokenize
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from hashray.artifact.bitmap import Bitmap
from hashray.errors import InputError, perhaps

LONGEST = 10_000  # characters
NAMES = {*keyword.kwlist} - {"and", "or", "not", "in", "True", "False", "None", "is", "if", "else", "lambda"}
FORMS = (
    "a comparison of an attribute with a value (== != < <= > >=, in [...], not in [...]), is_null(name), "
    "is_valid(name), starts_with(name, text), ends_with(name, text), contains(name, text), joined by and, or, not"
)
COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
TEXT_TESTS: dict[str, Callable[..., Any]] = {
    "starts_with": pc.starts_with, "ends_with": pc.ends_with, "contains": pc.match_substring,
}  # fmt: skip

NEVER = pc.scalar(pa.scalar(None, pa.bool_()))  # what is asked of a column without values


class Filter:
    """A parsed `where`. The same object may be used for any number of shards."""

    def __init__(self, where: str | pc.Expression) -> None:
        """Parse the text; a pyarrow expression is taken as it is.

        Raises:
            InputError: the text is none of the forms.
        """
        self.where = where
        self._tree: ast.expr | None = None
        if isinstance(where, pc.Expression):
            return
        if len(where) > LONGEST:
            raise InputError(f"where of {len(where):,} characters; at most {LONGEST:,} are taken")
        try:
            self._tree = ast.parse(_without_keywords(where.strip()), mode="eval").body
        except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError) as error:
            raise InputError(f"where = {where!r} is no expression ({error}); allowed is {FORMS}") from error

    def rows(self, table: pa.Table) -> Bitmap:
        """The rows of a shard for which the expression is true: null is not true.

        Args:
            table: the attributes of the shard's rows.

        Raises:
            InputError: an attribute is not there, or a value does not fit its type.
        """
        if not table.num_columns:
            raise InputError(f"where = {str(self.where)!r}: rows of this index have no attributes")
        try:
            expression = self.where
            if self._tree is not None:
                reader = _Reader(str(self.where), table)
                expression, table = reader.read(self._tree), reader.table
            kept = ds.InMemoryDataset(table).to_table(columns={"kept": expression}).column("kept")
            mask = pc.fill_null(kept.cast(pa.bool_()), False)
        except (pa.ArrowException, KeyError, TypeError, OverflowError, UnicodeError, RecursionError) as error:
            raise InputError(
                f"where = {str(self.where)!r} cannot be answered: {error}. Attributes: {_described(table.schema)}"
            ) from error
        return Bitmap.of_mask(np.asarray(mask.to_numpy(), bool))


def _without_keywords(where: str) -> str:
    """The text with Python's words that may name attributes, such as class, written as field('class')."""
    words = []
    for token in tokenize.generate_tokens(io.StringIO(where).readline):
        named = token.type == tokenize.NAME and token.string in NAMES
        words.append((tokenize.NAME, f"field({token.string!r})") if named else (token.type, token.string))
    return tokenize.untokenize(words).strip()


class _Reader:
    """Makes a tree of Python's syntax an expression of Arrow's, over the attributes of a table.

    What is asked about a column of lists is answered at once, and becomes one more column of `table`.
    """

    def __init__(self, where: str, table: pa.Table) -> None:
        self.where, self.schema, self.table = where, table.schema, table

    def read(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.BoolOp(op, values):
                parts = [self.read(value) for value in values]
                joined = parts[0]
                for part in parts[1:]:
                    joined = joined & part if isinstance(op, ast.And) else joined | part
                return joined
            case ast.BinOp(left, ast.BitAnd(), right):
                return self.read(left) & self.read(right)
            case ast.BinOp(left, ast.BitOr(), right):
                return self.read(left) | self.read(right)
            case ast.UnaryOp(ast.Not() | ast.Invert(), operand):
                return ~self.read(operand)
            case ast.Compare(left, ops, comparators):
                sides = [left, *comparators]
                parts = [self._compare(a, op, b) for a, op, b in zip(sides, ops, sides[1:], strict=False)]
                joined = parts[0]
                for part in parts[1:]:
                    joined = joined & part
                return joined
            case ast.Call(ast.Name(name), [argument], []) if name in ("is_null", "is_valid"):
                column = self._column(argument)
                return column.is_null() if name == "is_null" else column.is_valid()
            case ast.Call(ast.Name(name), [argument, ast.Constant(str(text))], []) if name in TEXT_TESTS:
                return TEXT_TESTS[name](self._column(argument), text)
            case ast.Name() | ast.Call() if self._is_column(node):
                return self._column(node)
            case ast.Constant(bool(value)):
                return pc.scalar(value)
        raise self._refused(node)

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.List | ast.Tuple | ast.Set):
            kind = self._kind(left)
            if pa.types.is_null(kind):
                return NEVER
            values = [self._value(item, kind) for item in right.elts]
            chosen = pa.array([value.as_py() for value in values if _holds(kind, value)], _plain(kind))
            inside = self._any(left, lambda values: pc.is_in(values, chosen))
            column = self._column(left)
            inside = column.isin(chosen) if inside is None else inside
            # Arrow says of null that it is not in a list: null is not true here, of `not in` neither.
            return inside if isinstance(op, ast.In) else ~inside & column.is_valid()
        compare = COMPARED.get(type(op))
        if compare is None:
            raise self._refused(left)
        if self._is_column(left) and self._is_column(right):
            return compare(self._column(left), self._column(right))
        column, other = (left, right) if self._is_column(left) else (right, left)
        kind = self._kind(column)
        if pa.types.is_null(kind):
            return NEVER
        value = self._value(other, kind)
        has = self._any(column, lambda values: pc.equal(values, value))
        if has is not None:
            if not isinstance(op, ast.Eq | ast.NotEq):
                raise self._refused(left)
            return has if isinstance(op, ast.Eq) else ~has & self._column(column).is_valid()
        return compare(self._column(column), value) if column is left else compare(value, self._column(column))

    def _any(self, node: ast.expr, test: Callable[[pa.Array], pa.Array]) -> pc.Expression | None:
        """Whether a value of each row's list passes a test; None where the column holds no lists."""
        name = self._name(node)
        if not _is_list(self.schema.field(name).type):
            return None
        lists = self.table.column(name).combine_chunks()
        values = pc.list_flatten(lists).cast(_plain(lists.type.value_type))
        passed = np.asarray(pc.fill_null(test(values), False).to_numpy(zero_copy_only=False), bool)
        mask = np.zeros(len(lists), bool)
        mask[pc.list_parent_indices(lists).to_numpy()[passed]] = True
        answer = f"answer {self.table.num_columns}"
        self.table = self.table.append_column(answer, pa.array(mask))
        return pc.field(answer)

    def _is_column(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) or (
            isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) == "field"
        )

    def _name(self, node: ast.expr) -> str:
        match node:
            case ast.Name(name):
                pass
            case ast.Call(ast.Name("field") | ast.Attribute(ast.Name("pc"), "field"), [ast.Constant(str(name))], []):
                pass
            case _:
                raise self._refused(node)
        if name not in self.schema.names:
            raise InputError(
                f"where = {self.where!r}: there is no attribute {name!r}{perhaps(name, self.schema.names)}; "
                f"attributes: {_described(self.schema)}"
            )
        return name

    def _column(self, node: ast.expr) -> pc.Expression:
        """A column, in the type that its values are compared in."""
        kind = self.schema.field(self._name(node)).type
        column = pc.field(self._name(node))
        return column if _plain(kind) == kind else column.cast(_plain(kind))

    def _kind(self, node: ast.expr) -> pa.DataType:
        """The type of a column's values; of a column of lists, of the values in them."""
        kind = self.schema.field(self._name(node)).type
        return kind.value_type if _is_list(kind) else kind

    def _value(self, node: ast.expr, kind: pa.DataType) -> pa.Scalar:
        """A constant as a value of an attribute's type: '2026-01-01' is a date for a column of dates."""
        try:
            value = ast.literal_eval(node)
        except ValueError:
            raise self._refused(node) from None
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_decimal(kind) and isinstance(value, (int, float, str)):
            return pa.scalar(_decimal(value, self.where))
        if pa.types.is_time(kind) and isinstance(value, str):
            return pa.scalar(_time(value, self.where)).cast(_plain(kind))
        plain = pa.scalar(value)
        numbers = pa.types.is_integer(kind) and isinstance(value, float)
        return plain if numbers else plain.cast(kind).cast(_plain(kind))

    def _refused(self, node: ast.expr) -> InputError:
        return InputError(f"where = {self.where!r}: {ast.unparse(node)!r} is not allowed; allowed is {FORMS}")


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type that values are compared in, which holds all of them: Arrow compares no dictionaries with a list."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return pa.string() if pa.types.is_string_view(kind) else pa.binary()
    if pa.types.is_time(kind):
        return pa.time64("ns")
    return pa.float32() if pa.types.is_float16(kind) else kind


def _holds(kind: pa.DataType, value: pa.Scalar) -> bool:
    """Whether a column of decimals may hold a value: no row equals one of more digits."""
    try:
        value.cast(_plain(kind))
    except pa.ArrowInvalid:
        if pa.types.is_decimal(_plain(kind)):
            return False
        raise
    return True


def _decimal(value: float | str, where: str) -> decimal.Decimal:
    try:
        return decimal.Decimal(str(value))
    except decimal.InvalidOperation:
        raise InputError(f"where = {where!r} cannot be answered: {value!r} is no decimal number") from None


def _time(text: str, where: str) -> datetime.time:
    try:
        time = datetime.time.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is not None:
        raise InputError(f"where = {where!r} cannot be answered: {text!r} is no time of a day, such as '16:30:00'")
    return time


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)

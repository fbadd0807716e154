"""Jinja for templates that nobody vouches for: bounded in time and memory.

A chat template is part of a model file, and a model file may be hostile. Jinja's immutable
sandbox keeps it from reaching Python, but not from loops without end or from texts that fill the
memory, and neither a signal nor another thread can interrupt one long operation of the
interpreter. So every operation is made short instead: loops, calls, filters, operators and
literals come by here, where the time is looked at, where what would grow too large is refused
before it is made, and where what is made is counted. Filters and methods are those that chat
templates use and whose cost is known.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.filters
import jinja2.nodes as n
import jinja2.runtime
import jinja2.sandbox
import jinja2.visitor

__all__ = ["BoundedEnvironment", "TemplateTooExpensive"]

_SECONDS = 2.0
"""CPU time that a template may use; a real one needs milliseconds."""
_MAX_SOURCE = 1 << 18
"""Characters of a template; the longest real ones have some ten thousand."""
# What one value, and all values together, may have in characters: so much, and so many times
# what the template was given.
_VALUE, _VALUE_TIMES = 1 << 22, 4
_TOTAL, _TOTAL_TIMES = 1 << 25, 64
_MAX_BITS = 1 << 12
"""Bits of a whole number."""

_FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first",
    "float", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "reverse", "select", "selectattr", "sort", "string", "title",
    "unique", "upper",
)  # fmt: skip
_STR_METHODS = frozenset({
    "capitalize", "count", "endswith", "find", "index", "isalpha", "isdigit", "islower", "isspace",
    "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace",
    "rfind", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip",
    "title", "upper",
})  # fmt: skip
_STRIPPING = frozenset({"strip", "lstrip", "rstrip"})
_OTHER_METHODS: dict[type, frozenset[str]] = {
    int: frozenset(),
    float: frozenset(),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"get", "items", "keys", "values"}),
}


class TemplateTooExpensive(Exception):
    """A template needs more time or memory than any chat template has reason to."""


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox in which templates end. For one thread.

    Compile with `bounded_template`, and call `allow` before each rendering.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, finalize=self._shown, **options)
        del self.globals["lipsum"]
        self.filters = {name: self._bounded_filter(self.filters[name]) for name in _FILTERS}
        for name, function in (
            ("indent", self._indent),
            ("join", self._join),
            ("replace", self._replace),
            # Jinja's own marks a text, after which `+` would escape for HTML what it joins to it.
            ("safe", jinja2.filters.FILTERS["string"]),
            ("tojson", self._to_json),
            ("trim", self._trim),
        ):
            self.filters[name] = self._bounded_filter(function)
        self.allow(0)

    def bounded_template(self, tree: n.Template) -> jinja2.Template:
        """Compile what `parse` made of a source."""
        tree = _Bounding().visit(tree)
        tree.set_environment(self)
        self.allow(0)
        return self.from_string(tree)

    def parse_bounded(self, source: str) -> n.Template:
        """Parse a source.

        Raises:
            TemplateTooExpensive: it is too long.
            jinja2.TemplateError: it is not a template.
        """
        if len(source) > _MAX_SOURCE:
            raise TemplateTooExpensive(f"it has more than {_MAX_SOURCE} characters")
        return self.parse(source)

    def allow(self, size: int) -> None:
        """Start counting anew, for a rendering of ``size`` characters of data."""
        self._deadline = time.thread_time() + _SECONDS
        self._most = _VALUE + _VALUE_TIMES * size
        self._left = _TOTAL + _TOTAL_TIMES * size

    # What compiled templates call.

    def tick(self) -> None:
        """Look at the time."""
        if time.thread_time() > self._deadline:
            raise TemplateTooExpensive(f"it needs more than {_SECONDS:g} s")

    def weighed(self, value: Any) -> Any:
        """``value``, once it is counted.

        Whatever it holds several times is counted as often: printed or compared, it would be.
        """
        weight = 0
        values = [value]
        while values:
            item = values.pop()
            weight += 1
            if isinstance(item, str):
                weight += len(item)
            elif isinstance(item, (list, tuple)):
                values.extend(item)
            elif isinstance(item, dict):
                values.extend(item)
                values.extend(item.values())
            elif isinstance(item, int) and item.bit_length() > _MAX_BITS:
                raise TemplateTooExpensive(f"a number has more than {_MAX_BITS} bits")
            if weight + len(values) > self._most:
                raise TemplateTooExpensive(f"a value has more than {self._most} characters")
        self._left -= weight
        if self._left < 0:
            raise TemplateTooExpensive("all values together are too large")
        return value

    def joined(self, *parts: Any) -> str:
        """The operator ``~``."""
        return self.concat(map(str, parts))

    def concat(self, parts: Iterable[str]) -> str:
        """Join the pieces of an output, of a block or of the whole template."""
        pieces = []
        length = 0
        for piece in parts:
            self.tick()
            pieces.append(piece)
            length += len(piece)
            self._check(length)
        return str(self.weighed("".join(pieces)))

    def call(
        self, context: jinja2.runtime.Context, function: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        """Call a function, a macro or a method."""
        self.tick()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            for ours in ("_loop_vars", "_block_vars"):  # what jinja adds for its own functions
                kwargs.pop(ours, None)
            return self.weighed(self._call_str(function, owner, args, kwargs))
        return self.weighed(super().call(context, function, *args, **kwargs))

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Apply one of the operators whose results can be much larger than what they take."""
        self.tick()
        if operator == "%" and isinstance(left, str):
            raise TypeError("a chat template can't format texts by %")
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() * right)
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and isinstance(other, int):
                    self._check_bits(one.bit_length() + other.bit_length())
                elif isinstance(one, int) and hasattr(other, "__len__"):
                    self._check(one * max(len(other), 1))
        return self.weighed(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use an attribute: of plain values, only a few methods."""
        for kind, methods in ((str, _STR_METHODS), *_OTHER_METHODS.items()):
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def _shown(self, value: Any) -> Any:
        # Texts of a block are kept until its end: each counts, as often as it is written.
        self.tick()
        return self.weighed(str(value))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """What stands for ``str.format``: without widths, which make a text of any length."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        layout: str = value.__self__

        def bounded(*args: Any) -> str:
            if ":" in layout:
                raise TemplateTooExpensive("a chat template can't format texts to a width")
            self._check(len(layout) + layout.count("{") * sum(len(str(each)) for each in args))
            return wrapped(*args)

        return bounded

    # What is large or slow in one call.

    def _call_str(self, method: Any, text: str, args: Any, kwargs: Any) -> Any:
        if method.__name__ == "replace":
            return self._replace(text, *args, **kwargs)
        if method.__name__ == "join":
            return self._join(args[0], text)
        if method.__name__ in _STRIPPING and args:
            self._check_stripped(args[0])
        return method(*args, **kwargs)

    def _check(self, length: int) -> None:
        if length > self._most:
            raise TemplateTooExpensive(f"a value has more than {self._most} characters")

    def _check_bits(self, bits: int) -> None:
        if bits > _MAX_BITS:
            raise TemplateTooExpensive(f"a number has more than {_MAX_BITS} bits")

    def _check_stripped(self, characters: Any) -> None:
        # Each end of the text is compared with all of them.
        if characters is not None and len(characters) > 256:
            raise TemplateTooExpensive("it strips more than 256 different characters")

    def _bounded_filter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # with it come jinja's marks
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            made = function(*args, **kwargs)
            # What `map` and `select` make must be counted, and may go on to `tojson`.
            return self.weighed(list(made) if isinstance(made, Iterator) else made)

        return bounded

    def _trim(self, value: Any, characters: str | None = None) -> str:
        self._check_stripped(characters)
        return str(value).strip(characters)

    def _replace(self, value: Any, old: Any, new: Any, count: int = -1) -> str:
        text, before, after = str(value), str(old), str(new)
        self._check(len(text) + text.count(before) * len(after))
        return text.replace(before, after, count)

    def _join(self, items: Iterable[Any], separator: Any = "", attribute: Any = None) -> str:
        values = list(items)
        if attribute is not None:
            values = [self.getitem(value, attribute) for value in values]
        between = str(separator)
        self._check(len(values) * len(between))
        return between.join(map(str, values))

    def _indent(
        self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        margin = width if isinstance(width, str) else " " * min(width, 256)
        lines = f"{text}\n".splitlines()  # so that a newline at the end is one afterwards
        self._check(len(lines) * len(margin))
        start = margin if first else ""
        return start + "\n".join(
            margin + line if at and (line or blank) else line for at, line in enumerate(lines)
        )

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # As Hugging Face's, not jinja's own, which escapes for HTML.
        if indent is not None and not 0 <= indent <= 16:
            raise ValueError(f"tojson: indent must be between 0 and 16, not {indent}")
        if separators is not None and max(map(len, separators)) > 16:
            raise ValueError("tojson: separators are longer than 16 characters")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        # Not `weighed` alone: deep indentation makes much of little.
        return encoder.encode(value) if indent is None else self.concat(encoder.iterencode(value))


class _Bounding(jinja2.visitor.NodeTransformer):
    """Leads what can repeat or grow through the environment."""

    def visit_For(self, node: n.For) -> n.Node:  # noqa: N802
        self.generic_visit(node)
        # Before the body, so that it runs however the loop goes on.
        node.body.insert(0, n.ExprStmt(_call("tick", [], node.lineno), lineno=node.lineno))
        return node

    def visit_Concat(self, node: n.Concat) -> n.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", node.nodes, node.lineno)

    def visit_List(self, node: n.List | n.Dict | n.Tuple) -> n.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("weighed", [node], node.lineno)

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: n.Tuple) -> n.Node:  # noqa: N802
        # Where something is unpacked, a tuple is not a value.
        return node if node.ctx == "store" else self.visit_List(node)


def _call(method: str, arguments: list[n.Expr], lineno: int) -> n.Call:
    function = n.EnvironmentAttribute(method, lineno=lineno)
    return n.Call(function, arguments, [], None, None, lineno=lineno)

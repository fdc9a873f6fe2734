"""
Where the names in tests come from. Only entry points come from the program: it may define a class `sys` or a function
`isclose`, and the tests still use the real ones.

Imports the standard library only, as the worker of the sandbox imports it too.
"""

import ast
import builtins
import symtable
import sys


# A name of these, or an alias that everybody uses, is no program's to define where another name could be meant.
LIBRARY = (
    "bisect",
    "cmath",
    "collections",
    "copy",
    "functools",
    "heapq",
    "itertools",
    "math",
    "operator",
    "statistics",
)
ALIASES = frozenset("np pd plt torch tf sp nx pytest mock approx".split())
ANY_NAME = frozenset("exec eval globals locals vars".split())  # may define names that nobody sees


def free_names(source: str) -> set[str]:
    """
    Names that a source takes from its globals without ever binding them there.

    Raises:
        `SyntaxError`: If it is no Python.
    """
    top = symtable.symtable(source, "<tests>", "exec")
    bound = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used, tables = set(), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_declared_global() and symbol.is_assigned():
                bound.add(symbol.get_name())
            if symbol.is_referenced() and (table is top or symbol.is_global()):
                used.add(symbol.get_name())
    return used - bound


def undefined_names(source: str) -> set[str]:
    """
    Names that tests use and that neither they nor Python define; a module of the standard library counts as defined. Empty
    where that cannot be told: tests that are no Python, or that define names by `import *` or `exec`.

    Example:
    ```python
    >>> sorted(undefined_names("assert isclose(f(1), 3) and sys.maxsize and len('')"))
    ['f', 'isclose']
    ```
    """
    try:
        free = free_names(source)
    except (SyntaxError, ValueError):
        return set()
    if free & ANY_NAME or "import *" in source:
        return set()
    return {name for name in free if not hasattr(builtins, name) and name not in sys.stdlib_module_names}


def entry_points(tests: str, declared: list[str]) -> tuple[list[str], list[str]]:
    """
    The names that tests get from the program, and the modules that they use without importing them.

    Without declared entry points, they are the names that the tests use and do not define: but no builtin, no module, and
    no name that a library has (`isclose`) beside one that none has.
    """
    free = sorted(name for name in free_names(tests) - set(declared) if not hasattr(builtins, name))
    called = {
        node.func.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Call) and hasattr(node.func, "id")
    }
    modules = [name for name in free if name in sys.stdlib_module_names and name not in called]
    if declared:
        return declared, modules
    candidates = [name for name in free if name not in modules]
    library = {name for module in LIBRARY for name in vars(__import__(module)) if name.islower()} | ALIASES
    return [name for name in candidates if name not in library] or candidates, modules


def uncalled_tests(source: str) -> list[str]:
    """Functions `test..` and classes `Test..` that the tests define and do not use: those that pytest would run."""
    top = symtable.symtable(source, "<tests>", "exec")
    defined = [table.get_name() for table in top.get_children() if table.get_type() in ("function", "class")]
    return [
        name
        for name in dict.fromkeys(defined)
        if name.startswith(("test", "Test")) and not top.lookup(name).is_referenced()
    ]

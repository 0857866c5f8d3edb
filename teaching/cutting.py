"""Take the bodies of functions out of a source, by name, and put them back.

The syntax tree gives the lines of a body; the rest of the file stays as it is, to the byte.
"""

import ast
import textwrap
from collections.abc import Iterable, Iterator
from typing import NamedTuple

WIDTH = 99  # columns of a line in the handout


class Body(NamedTuple):
    """The lines of a function's body behind its docstring: [start, end), counted from 0."""

    start: int
    end: int
    indent: str


def functions(tree: ast.AST, outer: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield every function of a module and its classes with its qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield outer + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{outer}{node.name}.")


def find_body(source: str, name: str) -> Body:
    """Return where the body of the function `name` stands; raise ValueError if it does not."""
    found = [node for own, node in functions(ast.parse(source)) if own == name]
    if len(found) != 1:
        raise ValueError(f"{len(found)} functions are called {name}, not one")
    node, lines = found[0], source.splitlines()
    documented = ast.get_docstring(node, clean=False) is not None
    if documented and len(node.body) == 1:
        raise ValueError(f"{name} has no body behind its docstring")
    start = node.body[documented].lineno - 1
    above = node.body[0].end_lineno if documented else node.lineno
    while start > above and lines[start - 1].lstrip().startswith("#"):
        start -= 1  # a comment that stands before the first statement goes with it
    line = lines[node.body[documented].lineno - 1]
    return Body(start, node.end_lineno, line[: len(line) - len(line.lstrip())])


def cut(source: str, todos: Iterable[tuple[str, str]]) -> str:
    """Replace the body of each (function, text) by an error that says what is to do."""
    for name, todo in todos:
        body, lines = find_body(source, name), source.splitlines(keepends=True)
        lines[body.start : body.end] = [placeholder(todo, body.indent)]
        source = "".join(lines)
    return source


def placeholder(todo: str, indent: str) -> str:
    """Return the statement that stands for a body."""
    inner = indent + 4 * " "
    parts = textwrap.wrap(todo, WIDTH - len(inner) - 3, drop_whitespace=False)
    quoted = "\n".join(f'{inner}"{part}"' for part in parts)
    return f"{indent}raise NotImplementedError(\n{quoted})\n"


def put_back(source: str, solution: str, names: Iterable[str]) -> str:
    """Return `source` with the bodies that the functions `names` have in `solution`."""
    for name in names:
        ours, theirs = find_body(solution, name), find_body(source, name)
        lines = source.splitlines(keepends=True)
        lines[theirs.start : theirs.end] = solution.splitlines(keepends=True)[ours.start : ours.end]
        source = "".join(lines)
    return source


def without_function(source: str, name: str, replacement: str) -> str:
    """Return `source` with the whole function `name` replaced, decorators and signature too."""
    node = dict(functions(ast.parse(source)))[name]
    lines = source.splitlines(keepends=True)
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1
    lines[first : node.end_lineno] = [replacement.rstrip("\n") + "\n"]
    return "".join(lines)

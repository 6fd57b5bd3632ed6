"""Answers that are almost right, to prove that a task does not take them: one digit, one sign, one step, one letter.

Programs are changed in one place of their syntax tree (`mutants`). Whether a change matters is not left to the tests:
`differs` asks the sandbox for a test input of the row on which the changed program gives something else.
"""

import ast
import copy
import re
from collections.abc import Iterator

from eval_harness.sandbox import Program

_UNIT = re.compile(r"\\(?:text|mbox|mathrm)\{[^}]*\}(?:\^\{?\d\}?)?")
_SHIFT = """
def _off_by_one(value):
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float, complex)): return value + 1
    if isinstance(value, str): return value + "x"
    if isinstance(value, list): return value + [None]
    if isinstance(value, tuple): return value + (None,)
    if isinstance(value, (set, frozenset)): return value | {"x"}
    if isinstance(value, dict): return {**value, "x": 0}
    return 0 if value is None else None
"""


def near_number(number: str, row: int) -> str:
    """Another number one step away: the sign flipped on odd rows (unless it is zero), else the last digit changed."""
    if row % 2 and number.strip("-0.,") != "":
        return number[1:] if number.startswith("-") else f"-{number}"
    position = max(index for index, character in enumerate(number) if character.isdigit())
    changed = str((int(number[position]) + 1) % 10) if number[position] != "9" else "8"
    return number[:position] + changed + number[position + 1 :]


def near_expression(expression: str, row: int) -> str:
    """A LaTeX expression with its last digit changed, its sign flipped, or a letter replaced where it has no digit.

    A unit's exponent is left alone: units are not scored.
    """
    value = _UNIT.sub(lambda match: " " * len(match[0]), expression)
    digits = [match.start() for match in re.finditer(r"\d", value)]
    if digits and (row % 2 == 0 or not re.fullmatch(r"-?[\d.,]+", expression)):
        position = digits[-1]
        changed = "8" if expression[position] == "9" else str(int(expression[position]) + 1)
        return expression[:position] + changed + expression[position + 1 :]
    if digits and expression.strip("-0.,") != "":
        return expression[1:] if expression.startswith("-") else f"-{expression}"
    if digits:
        return "1"
    words = re.sub(r"\\[a-zA-Z]+", lambda match: " " * len(match[0]), expression)
    letters = [match.start() for match in re.finditer(r"[A-Za-z]", words)]
    if letters:
        position = letters[-1]
        other = "q" if expression[position] != "q" else "w"
        return expression[:position] + other + expression[position + 1 :]
    return f"-{expression}" if not expression.startswith("-") else expression[1:]


def mutants(source: str, entry: str) -> Iterator[str]:
    """Versions of a program with one off-by-one each, likeliest to matter first; the last one moves what it returns.

    Args:
        source: a program.
        entry: the function to change; the whole program is changed where no function has this name.
    """
    tree = ast.parse(source)
    size = sum(1 for _ in ast.walk(_function(tree, entry)))
    for change in (_shorter_range, _other_comparison, _next_constant, _other_sign):
        for position in range(size):
            changed = copy.deepcopy(tree)
            node = next(node for index, node in enumerate(ast.walk(_function(changed, entry))) if index == position)
            if change(node):
                yield ast.unparse(ast.fix_missing_locations(changed))
    changed = copy.deepcopy(tree)
    function = _function(changed, entry)
    for node in ast.walk(function):
        if isinstance(node, ast.Return):
            node.value = ast.Call(ast.Name("_off_by_one", ast.Load()), [node.value or ast.Constant(None)], [])
    function.body = ast.parse(_SHIFT).body + function.body
    yield ast.unparse(ast.fix_missing_locations(changed))


def continuation(source: str, entry: str) -> str:
    """The body of a function, without its docstring: what a model writes after a HumanEval prompt."""
    function = copy.deepcopy(_function(ast.parse(source), entry))
    if isinstance(function.body[0], ast.Expr) and isinstance(function.body[0].value, ast.Constant):
        function.body = function.body[1:]
    return "".join(f"{line}\n" for line in ast.unparse(function).splitlines()[1:])


def _function(tree: ast.Module, name: str) -> ast.AST:
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return functions[-1] if functions else tree


def differs(reference: str, mutant: str, program: Program) -> Program:
    """A program for the sandbox that passes when the mutant gives another result on an input of the tests.

    Args:
        reference: the right program.
        mutant: the changed one.
        program: as judged: its tests supply the inputs.
    """
    names = [name for name in program.names if re.search(rf"^def {name}\b", reference, re.MULTILINE)]
    source = f"""
import copy
_differs = [False]
_sides = []
for _text in ({reference!r}, {mutant!r}):
    _space = {{"__name__": "candidate"}}
    exec(_text, _space)
    _sides.append(_space)
globals().update({{key: value for key, value in _sides[0].items() if not key.startswith("__")}})
def _outcome(function, a, k):
    try:
        return repr(function(*copy.deepcopy(a), **copy.deepcopy(k)))
    except Exception as error:
        return type(error)
def _watched(name):
    def call(*a, **k):
        if _outcome(_sides[0][name], a, k) != _outcome(_sides[1][name], a, k):
            _differs[0] = True
        return _sides[0][name](*a, **k)
    return call
for _name in {names!r}:
    globals()[_name] = _watched(_name)
def _mutant_differs(): return _differs[0]
"""
    return Program(
        source, f"{program.tests}\nassert _mutant_differs()", (*program.names, "_mutant_differs"), program.setup
    )


def _shorter_range(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range" and node.args):
        return False
    stop = 0 if len(node.args) == 1 else 1
    node.args[stop] = ast.BinOp(node.args[stop], ast.Sub(), ast.Constant(1))
    return True


def _other_comparison(node: ast.AST) -> bool:
    other = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
    if not isinstance(node, ast.Compare) or type(node.ops[0]) not in other:
        return False
    node.ops[0] = other[type(node.ops[0])]()
    return True


def _next_constant(node: ast.AST) -> bool:
    if not isinstance(node, ast.Constant) or isinstance(node.value, bool) or not isinstance(node.value, int):
        return False
    node.value += 1
    return True


def _other_sign(node: ast.AST) -> bool:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add | ast.Sub):
        return False
    node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
    return True

"""A tool of one's own. ``examples/sums.py`` writes questions that need it; docs/extending.md tells the whole.

From the folder that holds ``examples``::

    python -m examples.sums assets/sums
    searchrl train +experiment=smoke name=sums retrieval=custom \
        retrieval.import_path=examples.calculator:Calculator +retrieval.kwargs.digits=4 \
        data.train=assets/sums/train.jsonl data.eval=assets/sums/test.jsonl data.prompt_column=prompt

What the policy writes inside the search tags reaches ``search``; what that returns, the policy reads.
"""

from __future__ import annotations

import ast
import operator

from searchrl.trajectory import Document

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(term: str) -> float:
    """The value of numbers with + - * / and brackets. Nothing is executed, and powers would cost too much."""

    def value(node: ast.expr) -> float:
        match node:
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
                return OPERATIONS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.Constant(value=int() | float() as number):
                return number
        raise ValueError(term)

    return value(ast.parse(term.strip(), mode="eval").body)


class Calculator:
    """A ``Retriever``: these two methods. Every rank makes one, with ``retrieval.kwargs``."""

    def __init__(self, *, digits: int = 6) -> None:
        self._digits = digits

    async def search(self, query: str, top_k: int) -> list[Document]:
        """One document, whose title is the term. Of a mistake the policy is told; it is no failure."""
        try:
            said = str(round(calculate(query), self._digits))
        except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
            said = "This cannot be calculated: write numbers, + - * / and brackets."
        return [Document(id=query, contents=f'"{query}"\n{said}', score=1.0)]

    async def aclose(self) -> None:
        """Nothing to close."""

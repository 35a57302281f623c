"""How a rule enters the table of the tape."""

from collections.abc import Callable
from typing import Any

from lipgan.penalties.tape import RULES, Rule

__all__ = ["RULES", "rule"]


def rule(*funcs: Any) -> Callable[[Rule], Rule]:
    """Enter a function as the rule of these operations."""

    def register(function: Rule) -> Rule:
        for func in funcs:
            RULES[func] = function
        return function

    return register

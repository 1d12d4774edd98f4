"""The exception tree: one root, and an exit code that follows from the branch."""

from __future__ import annotations

import inspect

from penstock import errors


def test_tree_in_the_docstring_is_the_tree() -> None:
    classes = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]
    drawn = (errors.__doc__ or "").split("A message has")[0]
    for cls in classes:
        assert cls.__name__ in drawn
        assert issubclass(cls, errors.PenstockError)
        assert cls.exit_code == (2 if issubclass(cls, errors.UsageError) else 1)

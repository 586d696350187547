# SPDX-License-Identifier: Apache-2.0
"""Functions that connected processes run, by their names."""

from collections.abc import Callable


class Cases(dict[str, Callable[..., None]]):
    """The cases of a module: its decorator takes a function up, ``run`` is what ranks call."""

    def __call__(self, function):
        """Takes a function up under its name."""
        self[function.__name__] = function
        return function

    def run(self, name):
        """Calls one by its whole name, or by its first word; the others are arguments then."""
        first, *arguments = [name] if name in self else name.split()
        self[first](*arguments)

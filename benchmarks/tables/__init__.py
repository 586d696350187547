# SPDX-License-Identifier: Apache-2.0
"""Tables of figures by name, each written from the latest rows."""

from collections.abc import Callable

from tables import costs, guides, noise, paper, peers, scaling

TABLES: dict[str, Callable[[], str]] = {
    name: make
    for module in (peers, guides, noise, scaling, paper, costs)
    for name, make in module.TABLES.items()
}

"""Tables of what can be added without a change elsewhere: objectives, families, tasks, optimizers.

A table is filled when it is first looked into: by the modules of this project, and by installed packages, which name
theirs as entry points of a group:

    [project.entry-points."flax_diffusion.core"]
    toy = "toy_package.tasks"
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import TypeVar

from flax_diffusion.core.errors import ConfigError

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Members by name: those of this project in the order of their modules, then those of other packages.

    Args:
        what: What a member is, for messages: "task".
        modules: Modules whose import registers members; a package stands for the modules in it.
        group: Group of entry points whose modules may register more: "flax_diffusion.core".
    """

    def __init__(self, what: str, modules: Sequence[str], group: str):
        self.what, self._modules, self._group = what, modules, group
        self._members: dict[str, T] = {}
        self._owners: dict[str, str] = {}  # module of each member
        self._loaded = False

    def register(self, name: str, member: T) -> T:
        """Add a member and return it. To be called where a module is imported.

        Raises:
            ValueError: If another member has the name.
        """
        if self._members.setdefault(name, member) is not member:
            raise ValueError(f"there are two {self.what}s of the name {name}: rename one")
        self._owners[name] = sys._getframe(1).f_globals["__name__"]
        return member

    def _load(self) -> dict[str, T]:
        if not self._loaded:
            self._loaded = True  # a module that looks into the table while it is imported finds what is there
            try:
                self._import_all()
            except BaseException:
                self._loaded = False  # the next look tries again, and does not take a part for the whole
                raise
        return self._members

    def _import_all(self) -> None:
        imported = []
        for name in self._modules:
            module = importlib.import_module(name)
            inner = [one.name for one in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{name}.")]
            imported += [name, *map(_imported, inner)]
        load_extensions(self._group)
        places = {module: place for place, module in enumerate(imported)}
        names = sorted(self._members, key=lambda name: (places.get(self._owners[name], len(places)), name))
        self._members = {name: self._members[name] for name in names}

    def __getitem__(self, name: str) -> T:
        return self._load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())


def _imported(name: str) -> str:
    importlib.import_module(name)
    return name


@functools.cache
def load_extensions(group: str) -> None:
    """Import the modules that installed packages name in a group of entry points.

    Raises:
        ConfigError: If one cannot be imported.
    """
    for point in entry_points(group=group):
        try:
            point.load()
        except ImportError as error:
            raise ConfigError(
                f"the installed package {point.dist.name if point.dist else point.value} adds {point.value} to "
                f"{group}, which cannot be imported ({error}): repair it, or uninstall it"
            ) from error

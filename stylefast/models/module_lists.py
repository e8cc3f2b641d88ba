"""Lists of modules whose members have a class that type checkers know."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from torch import nn

Member = TypeVar("Member", bound=nn.Module)

if TYPE_CHECKING:

    class _ListOf(nn.ModuleList, Generic[Member]):
        def __iter__(self) -> Iterator[Member]: ...
        def __getitem__(self, index: int) -> Member: ...


def list_of(members: Iterable[Member]) -> "_ListOf[Member]":
    """Return an `nn.ModuleList`, of which a type checker then knows the members' class."""
    return cast("_ListOf[Member]", nn.ModuleList(members))

"""Which parameters an optimizer has, and which of them lie in packs; looked up anew only after a change."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from hf_ivon.packs import Pack, pack_key, packable
from hf_ivon.state import complete_state


class Single(NamedTuple):
    """A parameter that is worked on alone: its number in the optimizer, the options of its group."""

    index: int
    group: Mapping[str, Any]
    p: Tensor


class Roster:
    """The parameters of an optimizer, in packs and alone.

    Args:
        packs: Whether small parameters are worked on together.

    Attributes:
        trained: Parameters that need a gradient, in order; another list after every change.
        packs: Those of them that are small, in packs. Their state is complete.
        singles: All other parameters.
    """

    def __init__(self, packs: bool) -> None:
        self._with_packs = packs
        self._seen: tuple[list[Any], ...] | None = None
        self.trained: list[Tensor] = []
        self.packs: list[Pack] = []
        self.singles: list[Single] = []

    def refresh(
        self, groups: Sequence[Mapping[str, Any]], state: MutableMapping[Tensor, MutableMapping[str, Any]]
    ) -> None:
        """Look up what there is; parameters must hold their means.

        Args:
            groups: The optimizer's groups.
            state: Parameter to its state; that of packed ones is moved.
        """
        params = [p for group in groups for p in group["params"]]
        seen = ([*map(id, groups)], [*map(id, params)], [p.requires_grad for p in params])
        if seen == self._seen and all(pack.is_current(state) for pack in self.packs):
            return
        self._seen = None  # should the following be interrupted
        members: dict[tuple[Any, ...], list[Single]] = {}
        self.singles = []
        everyone = [Single(i, g, p) for i, (g, p) in enumerate((g, p) for g in groups for p in g["params"])]
        for single in everyone:
            _, group, p = single
            if self._with_packs and p.requires_grad and packable(p, state[p]):
                complete_state(p, group, state[p])
                members.setdefault(pack_key(group, p, state[p]), []).append(single)
            else:
                self.singles.append(single)
        self.packs = [
            Pack(
                together[0].group, [m.p for m in together], [m.index for m in together], [state[m.p] for m in together]
            )
            for together in members.values()
        ]
        self.trained = [p for p in params if p.requires_grad]
        self._seen = seen

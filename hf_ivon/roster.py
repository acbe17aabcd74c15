"""Which parameters an optimizer has, and which of them lie in packs; looked up anew only after a change."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from hf_ivon import distributed
from hf_ivon.packs import Pack, pack_key, packable
from hf_ivon.state import complete_state, parameter_names


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

        Raises:
            ValueError: If two parameters share memory.
        """
        params = [p for group in groups for p in group["params"]]
        seen = ([*map(id, groups)], [*map(id, params)], [p.requires_grad for p in params])
        if seen == self._seen and all(pack.is_current(state) for pack in self.packs):
            return
        self._seen = None  # should the following be interrupted
        check_memory(groups)
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


def check_memory(groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that no two trained parameters share memory: they would be sampled and updated one on top of the other.

    Parts of one tensor that lie side by side are fine.

    Args:
        groups: The optimizer's groups.

    Raises:
        ValueError: If two do; names them.
    """
    spans: list[tuple[str, int, int, Tensor]] = []
    for p in (p for group in groups for p in group["params"] if p.requires_grad):
        part = distributed.local(p)
        start = part.data_ptr()  # 0 if there is no memory
        # Between the elements of a tensor that is not contiguous may be those of others; the first is its own.
        size = part.numel() if part.is_contiguous() else min(part.numel(), 1)
        if start and size:
            spans.append((str(part.device), start, start + size * part.element_size(), p))
    spans.sort(key=itemgetter(0, 1))
    for (device, _, end, p), (other, start, _, q) in pairwise(spans):
        if device == other and start < end:
            names = parameter_names(groups)
            first, second = (names[r] for r in names if r is p or r is q)
            raise ValueError(
                f"Parameters must not share memory, but {first!r} and {second!r} do. Tie them as one parameter "
                f"(`head.weight = embedding.weight`), give one memory of its own, or freeze it."
            )

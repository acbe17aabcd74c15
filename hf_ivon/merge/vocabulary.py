"""Tokenizers of merged models: whether they agree, and tokens that were added to some of them, united."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ivon.merge.files import Checkpoint
from hf_ivon.tensor_files import Entry, TensorFiles

FILE = "tokenizer.json"
# Ends of the names of tensors that have a row for each token.
_ROWS = (
    "embed_tokens.weight",
    "word_embeddings.weight",
    "wte.weight",
    "embed_in.weight",
    "shared.weight",
    "lm_head.weight",
    "lm_head.bias",
    "lm_head.decoder.weight",
    "lm_head.decoder.bias",
    "predictions.decoder.weight",
    "predictions.decoder.bias",
    "predictions.bias",
    "embed_out.weight",
)


def vocabulary(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Return a tokenizer's tokens and their places, those that were added included; None if there is no file."""
    tokenizer = checkpoint.json(FILE)
    known = tokenizer.get("model", {}).get("vocab")
    if known is None:
        return None
    if not isinstance(known, dict):  # unigram models list tokens with their scores
        known = {token: place for place, (token, _) in enumerate(known)}
    return {**known, **{t["content"]: t["id"] for t in tokenizer.get("added_tokens", [])}}


def tokenizer_problems(models: Sequence[Checkpoint], union: bool) -> list[str]:
    """Name the first token that two tokenizers have at different places: merged embeddings would be of both.

    Args:
        models: The models.
        union: Whether tokens that were added to some of them shall be united.

    Returns:
        Problems, one string each.
    """
    known = [(m, v) for m in models if (v := vocabulary(m)) is not None]
    problems = []
    if union and len(known) < len(models):
        lacking = ", ".join(m.name for m in models if vocabulary(m) is None)
        problems.append(f"{lacking} has no {FILE}, which a union of tokens needs")
    for model, other in known[1:]:
        first, reference = known[0]
        same_core = _core(first) == _core(model)
        if other == reference or (union and same_core):
            continue
        token = next(t for t in [*reference, *other] if reference.get(t) != other.get(t))
        places = f"{reference.get(token)} in {first.name}, {other.get(token)} in {model.name}"
        advice = ": pass --tokenizer union to have the tokens of all" if same_core else ""
        problems.append(
            f"the tokenizers of {first.name} and {model.name} differ, first in {token!r} ({places}){advice}"
        )
    return problems


def _core(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what splits text, without the tokens that were added."""
    return {k: v for k, v in checkpoint.json(FILE).items() if k in ("model", "normalizer", "pre_tokenizer")}


class UnitedFiles(Mapping[str, Tensor]):
    """Tensors as if they had a row for each token of all models; other tensors are as they are.

    Args:
        original: The tensors.
        places: For each united token its row in the original, -1 where it has none, (tokens,).
        names: The tensors with a row for each token.
        fill: Returns the rows of a tensor that the original lacks, given the united tokens.
    """

    def __init__(
        self, original: TensorFiles, places: Tensor, names: Sequence[str], fill: Callable[[str, Tensor], Tensor]
    ) -> None:
        self.original = original
        self._places, self._fill, self._names = places, fill, set(names)
        self._last: tuple[str, Tensor] | None = None
        self.entries: dict[str, Entry] = {
            n: dataclasses.replace(e, shape=(len(places), *e.shape[1:])) if n in self._names else e
            for n, e in original.entries.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        return self.rows(name, 0, entry.shape[0]) if entry.shape else self.original[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def expect(self, name: str, start: int, stop: int) -> None:
        """Let the system begin to read rows; see `TensorFiles.expect`."""
        if name not in self._names:
            self.original.expect(name, start, stop)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor; see `TensorFiles.rows`."""
        if name not in self._names:
            return self.original.rows(name, start, stop)
        last = self._last
        if last is None or last[0] != name:
            last = self._last = (name, self.original[name])
        places = self._places[start:stop]
        found = last[1][places.clamp_min(0)]
        lacking = (places < 0).nonzero()[:, 0]
        if len(lacking):
            found[lacking] = self._fill(name, lacking + start).to(found.dtype)
        return found


def unite(models: Sequence[Checkpoint], base: Checkpoint | None) -> list[str]:
    """Make all models look as if they had the tokens of all, those of the first one first.

    A row that a model lacks is the average of those that have it (so is the base's), and its posterior has no Hessian.

    Args:
        models: Models whose tokenizers differ at most in tokens that were added; changed in place.
        base: The base model; changed in place.

    Returns:
        The tokens that the first model lacked, in order.
    """
    vocabularies = [vocabulary(m) or {} for m in models]
    first = vocabularies[0]
    added = list(dict.fromkeys(t for v in vocabularies[1:] for t in sorted(v, key=v.__getitem__) if t not in first))
    start = max(first.values()) + 1
    united = {**first, **{t: start + i for i, t in enumerate(added)}}
    originals = [_tensors(m) for m in models]
    places = [_places(united, v) for v in vocabularies]
    names = [n for n, e in originals[0].entries.items() if n.endswith(_ROWS) and e.shape[0] > max(first.values())]

    def average(name: str, tokens: Tensor) -> Tensor:
        name = next((n for n in names if n.endswith(name)), name)
        entry = originals[0].entries[name]
        total, count = torch.zeros(len(tokens), *entry.shape[1:]), torch.zeros(len(tokens))
        for tensors, own in zip(originals, places, strict=True):
            has = own[tokens] >= 0
            total[has] += tensors[name][own[tokens][has]].float()
            count += has
        return total / count.clamp_min(1).view(-1, *[1] * (total.dim() - 1))

    for model, own in zip(models, places, strict=True):
        model.tensors = UnitedFiles(_tensors(model), own, names, average)
        _unite_posterior(model, own, names)
    if base is not None:
        tensors = _tensors(base)
        rows = [n for n in tensors.entries if any(name.endswith(n) for name in names)]
        own = _places(united, vocabulary(base) or {t: i for t, i in first.items() if i < _rows(tensors, rows)})
        base.tensors = UnitedFiles(tensors, own, rows, average)
        _unite_posterior(base, own, rows)
    return added


def _tensors(checkpoint: Checkpoint) -> TensorFiles:
    assert isinstance(checkpoint.tensors, TensorFiles)  # not united before
    return checkpoint.tensors


def _rows(tensors: TensorFiles, names: Sequence[str]) -> int:
    return min((tensors.entries[n].shape[0] for n in names), default=0)


def _places(united: Mapping[str, int], own: Mapping[str, int]) -> Tensor:
    places = torch.full((max(united.values()) + 1,), -1, dtype=torch.int64)
    for token, place in united.items():
        places[place] = own.get(token, -1)
    return places


def _unite_posterior(model: Checkpoint, places: Tensor, names: Sequence[str]) -> None:
    posterior, config = model.posterior, model.config
    if not isinstance(posterior, TensorFiles) or config is None:
        return
    entries = posterior.entries

    def prior(name: str, tokens: Tensor) -> Tensor:
        # Without a Hessian; where there is no prior either, with next to none.
        delta = config.of("weight_decay", name) or 1e-6 * config.of("hess_init", name)
        return torch.full((len(tokens), *entries[name].shape[1:]), 1.0 / (config.of("ess", name) * delta))

    model.posterior = UnitedFiles(posterior, places, [n for n in names if n in posterior], prior)


def write_tokenizer(source: Checkpoint, models: Sequence[Checkpoint], tokens: Sequence[str], directory: Path) -> None:
    """Write the first model's tokenizer with the tokens that others have, and the size of the vocabulary.

    Args:
        source: Whose tokenizer it is.
        models: The models, for what kind of token each is.
        tokens: What `unite` returned.
        directory: Where to; holds the configuration.
    """
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.directory)
    kinds = {t["content"]: t for m in models for t in m.json(FILE).get("added_tokens", [])}
    for token in tokens:
        kind = {k: v for k, v in kinds[token].items() if k not in ("id", "content", "special")}
        tokenizer.add_tokens([AddedToken(token, **kind, special=kinds[token]["special"])], kinds[token]["special"])
    tokenizer.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["vocab_size"] = len(tokenizer)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

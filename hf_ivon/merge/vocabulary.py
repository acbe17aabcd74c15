"""Tokenizers of merged models: whether they agree, and tokens that were added to some of them, united."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ivon.merge.files import Checkpoint
from hf_ivon.tensor_files import Entry, TensorFiles

FILE = "tokenizer.json"
# Ends of the names of tensors that have a row for each token. They count only where they have as many rows as the
# configuration says, so that they may be as short as they are.
_ROWS = (
    "embed_tokens.weight",
    "word_embeddings.weight",
    "word_embedding.weight",
    "tok_embeddings.weight",
    "token_embedding.weight",
    "wte.weight",
    "embed_in.weight",
    "embed_out.weight",
    "shared.weight",
    "lm_head.weight",
    "lm_head.bias",
    "lm_loss.weight",
    "lm_loss.bias",
    "decoder.weight",
    "decoder.bias",
    "predictions.bias",
    "vocab_projector.weight",
    "vocab_projector.bias",
)
_OF_A_LAYER = re.compile(r"\.\d+\.\w+\.")  # "h.0.mlp.bias": such tensors can be as large by chance
_COLUMNS = ("final_logits_bias",)  # (1, tokens)
_OLDER = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


def vocabulary(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Return a tokenizer's tokens and their places, those that were added included; None if there is no file."""
    tokenizer = checkpoint.json(FILE)
    model = tokenizer.get("model")
    known = model.get("vocab") if isinstance(model, dict) else None
    if known is None:
        return None
    if not isinstance(known, dict):  # unigram models list tokens with their scores
        known = {token: place for place, (token, _) in enumerate(known)}
    return {**known, **{t["content"]: t["id"] for t in tokenizer.get("added_tokens") or []}}


def tokenizer_problems(models: Sequence[Checkpoint], union: bool) -> list[str]:
    """Name the first token that two tokenizers have at different places: merged embeddings would be of both.

    Args:
        models: The models.
        union: Whether tokens that were added to some of them shall be united.

    Returns:
        Problems, one string each.
    """
    vocabularies = [(m, vocabulary(m)) for m in models]
    known = [(m, v) for m, v in vocabularies if v is not None]
    lacking = [m for m, v in vocabularies if v is None]
    problems = _older_problems(lacking)
    if union and lacking:
        problems.append(f"{', '.join(m.name for m in lacking)} has no {FILE}, which a union of tokens needs")
    for model, other in known[1:]:
        first, reference = known[0]
        same_core = _core(first) == _core(model)
        if other == reference or (union and same_core):
            continue
        token = next(t for t in [*reference, *other] if reference.get(t) != other.get(t))
        places = f"{reference.get(token)} in {first.name}, {other.get(token)} in {model.name}"
        can_unite = same_core and not model.is_adapter
        advice = ": pass --tokenizer union to have the tokens of all" if can_unite else ""
        problems.append(
            f"the tokenizers of {first.name} and {model.name} differ, first in {token!r} ({places}){advice}"
        )
    return problems


def _older_problems(models: Sequence[Checkpoint]) -> list[str]:
    """Compare vocabularies of models without a `tokenizer.json`, byte by byte."""
    problems = []
    for name in _OLDER:
        found = [(m, file.read_bytes()) for m in models if (file := m.directory / name).is_file()]
        problems += [
            f"the tokenizers of {found[0][0].name} and {model.name} differ in {name}: if they are one, copy the file"
            for model, content in found[1:]
            if content != found[0][1]
        ]
    return problems


def _core(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what splits text, without the tokens that were added."""
    return {k: v for k, v in checkpoint.json(FILE).items() if k in ("model", "normalizer", "pre_tokenizer")}


class UnitedFiles(Mapping[str, Tensor]):
    """Tensors as if they had a row for each token of all models; other tensors are as they are.

    Args:
        original: The tensors.
        places: For each united token its row in the original, -1 where it has none, (tokens,).
        dims: Which dimension of a tensor is that of the tokens, by name; of other tensors none is.
        fill: Returns the rows of a tensor that the original lacks, given the united tokens; tokens come first.

    Attributes:
        original: The tensors as they were.
        places: As given.
        entries: What is known of each tensor without reading it.
    """

    def __init__(
        self,
        original: TensorFiles,
        places: Tensor,
        dims: Mapping[str, int],
        fill: Callable[[str, Tensor], Tensor],
    ) -> None:
        self.original, self.places = original, places
        self._fill, self._dims = fill, dims
        self._last: tuple[str, Tensor] | None = None
        self.entries: dict[str, Entry] = dict(original.entries)
        for name, dim in dims.items():
            shape = list(self.entries[name].shape)
            shape[dim] = len(places)
            self.entries[name] = dataclasses.replace(self.entries[name], shape=tuple(shape))

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        return self.rows(name, 0, entry.shape[0]) if entry.shape else self.original[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def expect(self, name: str, start: int, stop: int) -> None:
        """Let the system begin to read rows; see `TensorFiles.expect`."""
        if name not in self._dims:
            self.original.expect(name, start, stop)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor; see `TensorFiles.rows`."""
        dim = self._dims.get(name)
        if dim is None:
            return self.original.rows(name, start, stop)
        last = self._last
        if last is None or last[0] != name:
            last = self._last = (name, self.original[name].movedim(dim, 0))
        first, end = (start, stop) if dim == 0 else (0, len(self.places))
        places = self.places[first:end]
        found = last[1][places.clamp_min(0)]
        lacking = (places < 0).nonzero()[:, 0]
        if len(lacking):
            found[lacking] = self._fill(name, lacking + first).to(found.dtype)
        return found if dim == 0 else found.movedim(0, dim)[start:stop].contiguous()


def unite(models: Sequence[Checkpoint], base: Checkpoint | None, problems: list[str]) -> list[str] | None:
    """Make all models look as if they had the tokens of all, those of the first one first.

    The first model's rows keep their places, also those that belong to no token. A row that a model lacks is the
    average of those that have it (so is the base's), and its posterior has no Hessian.

    Args:
        models: Models whose tokenizers differ at most in tokens that were added; changed in place.
        base: The base model; changed in place.
        problems: Where to say why they cannot be united; then nothing is changed.

    Returns:
        The tokens that the first model lacked, in order; None if nothing had to be united.
    """
    if _alike([*models, *([base] if base is not None else [])]):
        return None
    sizes = [_size(m) or 0 for m in models]
    dims = [_dims(m, size, problems) for m, size in zip(models, sizes, strict=True)]
    found = _numbers(models, problems)
    if found is None:
        return None
    vocabularies, united, added = found
    first = vocabularies[0]
    for model, size, known in zip(models, sizes, vocabularies, strict=True):
        if size and max(known.values()) >= size:
            problems.append(f"the tokenizer of {model.name} has more tokens than the {size} rows of its model")
    if problems:
        return None
    rows = max(sizes[0], max(united.values()) + 1)
    originals = [_tensors(m) for m in models]
    places = [_places(united, v, rows, size) for v, size in zip(vocabularies, sizes, strict=True)]

    def average(like: Entry, dim: int, name: str, tokens: Tensor) -> Tensor:
        shape = [n for d, n in enumerate(like.shape) if d != dim]
        total, count = torch.zeros(len(tokens), *shape), torch.zeros(len(tokens))
        for tensors, own, known in zip(originals, places, dims, strict=True):
            # In a base saved alone, names lack what is in front.
            found = name if name in known else next((n for n in known if n.endswith(name)), None)
            if found is None or [n for d, n in enumerate(tensors.entries[found].shape) if d != known[found]] != shape:
                continue
            has = own[tokens] >= 0
            total[has] += tensors[found].movedim(known[found], 0)[own[tokens][has]].float()
            count += has
        return total / count.clamp_min(1).view(-1, *[1] * len(shape))

    def change(model: Checkpoint, own: Tensor, known: Mapping[str, int]) -> None:
        tensors = _tensors(model)

        def fill(name: str, tokens: Tensor) -> Tensor:
            return average(tensors.entries[name], known[name], name, tokens)

        model.tensors = UnitedFiles(tensors, own, known, fill)
        _unite_posterior(model, own, known)

    for model, own, dim_of in zip(models, places, dims, strict=True):
        change(model, own, dim_of)
    if base is not None:
        ends = {n: dim for n in base.tensors for known in dims for name, dim in known.items() if name.endswith(n)}
        shapes = {n: base.tensors.entries[n].shape for n in ends}
        size = _size(base) or min((shape[0] for n, shape in shapes.items() if ends[n] == 0), default=0)
        ends = {n: dim for n, dim in ends.items() if shapes[n][dim : dim + 1] == (size,)}
        # Without a tokenizer of its own it has the first tokens.
        numbers = first if vocabulary(base) is None else dict(_load(base).get_vocab())
        change(base, _places(united, numbers, rows, size), ends)
    return added


def _alike(checkpoints: Sequence[Checkpoint]) -> bool:
    """Tell whether there is nothing to unite; a base can be without a tokenizer."""
    known = [v for c in checkpoints if (v := vocabulary(c)) is not None]
    return all(v == known[0] for v in known) and len({_size(c) for c in checkpoints}) == 1


def _load(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint.directory)


def _numbers(
    models: Sequence[Checkpoint], problems: list[str]
) -> tuple[list[dict[str, int]], dict[str, int], list[str]] | None:
    """Return each model's tokens with their numbers, those of all, and which the first one lacked."""
    try:
        # Not what is in the files: a token may have another number there than the one that it is loaded with.
        tokenizers = [_load(m) for m in models]
        vocabularies = [dict(t.get_vocab()) for t in tokenizers]
        added = _add(tokenizers)
    except Exception as err:  # which is what `tokenizers` raises
        problems.append(f"the tokenizers cannot be united ({err})")
        return None
    united = {**vocabularies[0], **{token: tokenizers[0].convert_tokens_to_ids(token) for token in added}}
    if len(set(united.values())) < len(united):
        problems.append(f"the tokenizer of {models[0].name} gives new tokens numbers that others have")
    return vocabularies, united, added


def _add(tokenizers: Sequence[Any]) -> list[str]:
    """Add to the first tokenizer the tokens that it lacks, and return them in order."""
    first, *others = tokenizers
    known, added = set(first.get_vocab()), []
    for other in others:
        for _, token in sorted(other.added_tokens_decoder.items()):
            if token.content not in known:
                first.add_tokens([token], special_tokens=token.special)
                known.add(token.content)
                added.append(token.content)
    return added


def _size(checkpoint: Checkpoint) -> int | None:
    """Return the number of rows for tokens, those that belong to none included; None if it is not said."""
    config = checkpoint.json("config.json")
    return next((c["vocab_size"] for c in _parts(config) if isinstance(c.get("vocab_size"), int)), None)


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return where a configuration may have its `vocab_size`; that of the text counts first."""
    return [*([config["text_config"]] if isinstance(config.get("text_config"), dict) else []), config]


def _dims(model: Checkpoint, size: int, problems: list[str]) -> dict[str, int]:
    """Return by name which dimension of a tensor is that of the tokens."""
    if model.is_adapter or not size:
        lacks = "is an adapter" if model.is_adapter else "does not say its `vocab_size` in config.json"
        problems.append(f"{model.name} {lacks}, so that its tokens cannot be united with others")
        return {}
    entries = model.tensors.entries
    found = {n: 0 for n, e in entries.items() if n.endswith(_ROWS) and e.shape[:1] == (size,)}
    found |= {n: 1 for n, e in entries.items() if n.endswith(_COLUMNS) and e.shape[1:] == (size,)}
    other = [n for n, e in entries.items() if n not in found and size in e.shape and not _OF_A_LAYER.search(n)]
    if other or not found:
        what = f"`{other[0]}`, which is not known, may" if other else "no tensor is known to"
        problems.append(f"the tokens of {model.name} cannot be united: {what} have a row for each of its {size}")
    return found


def _tensors(checkpoint: Checkpoint) -> TensorFiles:
    assert isinstance(checkpoint.tensors, TensorFiles)  # not united before
    return checkpoint.tensors


def _places(united: Mapping[str, int], own: Mapping[str, int], rows: int, size: int) -> Tensor:
    """Return for each united row that of a model with `size` rows, -1 where it has none."""
    places = torch.arange(rows)  # rows without a token are what they are
    places[[i for i in own.values() if i < rows]] = -1
    places[size:] = -1
    for token, place in united.items():
        places[place] = own[token] if own.get(token, size) < size else -1
    return places


def _unite_posterior(model: Checkpoint, places: Tensor, dims: Mapping[str, int]) -> None:
    posterior, config = model.posterior, model.config
    if not isinstance(posterior, TensorFiles) or config is None:
        return
    entries = posterior.entries

    def prior(name: str, tokens: Tensor) -> Tensor:
        # Without a Hessian; where there is no prior either, with next to none.
        delta = config.of("weight_decay", name) or 1e-6 * config.of("hess_init", name)
        shape = [n for d, n in enumerate(entries[name].shape) if d != dims[name]]
        return torch.full((len(tokens), *shape), 1.0 / (config.of("ess", name) * delta))

    model.posterior = UnitedFiles(posterior, places, {n: dim for n, dim in dims.items() if n in posterior}, prior)


def united_tokenizer(models: Sequence[Checkpoint]) -> Any:
    """Return the first model's tokenizer, of Transformers, with the tokens that others have.

    Args:
        models: The models, as for `unite`.
    """
    tokenizers = [_load(m) for m in models]
    _add(tokenizers)
    return tokenizers[0]


def write_tokenizer(source: Checkpoint, models: Sequence[Checkpoint], directory: Path) -> None:
    """Write the tokenizer of united models, and what the configurations say of tokens.

    Args:
        source: Whose configuration it is.
        models: What `unite` has changed.
        directory: Where to; holds the configuration, and those of separate heads.
    """
    (directory / "added_tokens.json").unlink(missing_ok=True)  # of the source, by its own numbers
    united_tokenizer(models).save_pretrained(directory)
    for file in ("config.json", "generation_config.json"):
        _renumber(directory / file, source)
    for model in models:
        _renumber(directory / "heads" / model.short_name / "config.json", model)


def united_settings(config: Mapping[str, Any], model: Checkpoint) -> dict[str, Any]:
    """Return what changes in a model's configuration by united tokens: its size, and the numbers of special tokens.

    Args:
        config: The configuration, or that of the text in it.
        model: Whose it is.

    Returns:
        Settings by name; empty if no tokens were united.
    """
    if not isinstance(model.tensors, UnitedFiles):
        return {}
    places = model.tensors.places.tolist()
    changed: dict[str, Any] = {"vocab_size": len(places)} if "vocab_size" in config else {}
    for name, value in config.items():
        if name.endswith("_token_id"):
            new = [places.index(v) if v in places else v for v in (value if isinstance(value, list) else [value])]
            changed[name] = new if isinstance(value, list) else new[0]
    return changed


def _renumber(path: Path, model: Checkpoint) -> None:
    """Change a model's configuration to the united tokens: the size of the vocabulary, special ones."""
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in _parts(config):
        part.update(united_settings(part, model))
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

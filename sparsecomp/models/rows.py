"""Which rows of a layer's input are real tokens and which are padding, batch by batch.

Takes a batch and tensors that the model makes of it, gives masks over their leading dimensions. Knows nothing of
statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from sparsecomp.errors import CalibrationError
from sparsecomp.models.batches import fresh
from sparsecomp.models.layers import check_globs
from sparsecomp.modules.snapshot import ModuleState, tensors_of

Masks = Tensor | Mapping[str, Tensor | None] | None
RowMask = Callable[[Any], Masks]

_MASK, _DECODER_MASK = "attention_mask", "decoder_attention_mask"
_TEXT = ("input_ids", "inputs_embeds")
# come with the ids, or do not reach a layer's input
_BESIDE_TEXT = ("token_type_ids", "position_ids", "cache_position")
_ASK = "pass mask=lambda batch: ... that gives the mask of the layer inputs, or a mapping from globs on names to masks"


class RowSource(Protocol):
    """Tells which rows of layer inputs count."""

    def learn(self, batch: Any, run: Callable[[Any], object]) -> None:
        """May run a part of the batch first."""

    def reading(self, index: int, batch: Any) -> AbstractContextManager[None]:
        """The batch is run within."""

    def of(self, name: str, x: Tensor) -> Tensor | None:
        """A mask over the leading dimensions of the layer's input; None counts every row."""


@dataclass(frozen=True, eq=False)
class _Explicit:
    """What ``mask(batch)`` gave: one mask for all inputs that it fits, or masks by globs on names."""

    masks: Masks

    def of(self, name: str) -> Tensor | None:
        if self.masks is None or isinstance(self.masks, Tensor):
            return self.masks
        return next((each for glob, each in self.masks.items() if fnmatchcase(name, glob)), None)


@dataclass(frozen=True, eq=False)
class _Source:
    """Tensors of a batch that share rows, and the mask [B, T] over these; None counts all."""

    tensors: tuple[Tensor, ...]
    mask: Tensor | None


class RowMasks:
    """The masks of one run over batches: those that ``mask`` gives, else the attention masks of mappings.

    An "attention_mask" [B, T] belongs to what is made of "input_ids" and a "decoder_attention_mask" to the decoder's
    rows; what is made of other parts of a batch counts whole. Raises CalibrationError where it cannot be told which
    mask an input has, or which of its axes the mask speaks of.
    """

    def __init__(
        self, model: nn.Module, mask: RowMask | None, names: Collection[str], images: Collection[str] = ()
    ) -> None:
        """``mask(batch)`` as in ``calibrate``; ``names`` are those that its globs may speak of.

        ``images`` are those of them whose inputs are images [B, C, H, W], of which a mask [B] alone can speak.
        """
        self._model, self._mask, self._names, self._images = model, mask, names, frozenset(images)
        self._decoder = _decoder_of(model)
        # Hugging Face models take [B, T]; in other models the order of the axes is theirs
        self._batch_first = hasattr(model, "config") and isinstance(getattr(model, "main_input_name", None), str)
        self._layouts: dict[str, str] = {}
        self._learned = False
        self._batch = 0
        self._explicit: _Explicit | None = None
        self._sources: list[_Source] = []
        self._tracker: _Tracker | None = None
        self._given = False
        self._fitted = False

    @property
    def useless(self) -> bool:
        """Whether masks were given with ``mask`` and none has fitted an input so far."""
        return self._given and not self._fitted

    @contextmanager
    def reading(self, index: int, batch: Any) -> Iterator[None]:
        """The model is run on this very batch within; ``of`` tells of its tensors."""
        self._batch, self._explicit, self._sources, self._tracker = index, None, [], None
        following: AbstractContextManager[object] = nullcontext()
        if self._mask is not None:
            self._explicit = _Explicit(_checked(self._mask(batch)))
            if isinstance(self._explicit.masks, Mapping):
                check_globs(self._explicit.masks, self._names, "mask for")
            self._given |= self._explicit.masks is not None
        elif isinstance(batch, Mapping):
            self._sources = _sources(batch, self._decoder is not None)
            if len(self._sources) > 1 and any(_hides(source.mask) for source in self._sources):
                self._tracker = _Tracker({place: each.tensors for place, each in enumerate(self._sources)})
                following = self._tracker
        handle = None
        if self._tracker is not None and self._decoder is not None:
            handle = self._decoder.register_forward_pre_hook(self._tracker.enters_decoder, with_kwargs=True)
        try:
            with following:
                yield
        finally:
            if handle is not None:
                handle.remove()
            self._tracker = None

    def of(self, name: str, x: Tensor) -> Tensor | None:
        """True on the real rows of ``x`` [..., features], a bool mask of its leading dimensions; None counts all."""
        if name in self._images:
            return self._of_images(name, x)
        if self._explicit is not None:
            mask = self._explicit.of(name)
            fitting = None if mask is None else _leading(mask, x)
            self._fitted |= fitting is not None
            return None if fitting is None else fitting.to(x.device)
        chosen = self._choose(name, x)
        if chosen is not None and (self._tracker is not None or len(self._sources) == 1):
            self._note_layout(name, chosen, x.shape[:-1])
        if chosen is None or not _hides(chosen):
            return None
        fitting = self._fit(name, chosen, x)
        return None if fitting is None else fitting.to(x.device)

    def _of_images(self, name: str, x: Tensor) -> Tensor | None:
        mask = None if self._explicit is None else self._explicit.of(name)
        if mask is None or x.ndim != 4 or mask.shape != x.shape[:1]:
            return None
        self._fitted = True
        return mask.to(x.device)

    def learn(self, batch: Any, run: Callable[[Any], object]) -> None:
        """Run the model on a part of a batch that has as many texts as tokens, to see which axis of what is which.

        Only models that take [B, T], as those of Hugging Face do, can be given a part; ``run`` runs such a part.
        """
        if self._learned or self._mask is not None or not self._batch_first or not isinstance(batch, Mapping):
            return
        square = [_attention(batch, key) for key in (_MASK, _DECODER_MASK)]
        mask = next((each for each in square if _hides(each) and each is not None and _is_ambiguous(each)), None)
        if mask is None:
            return
        count = len(mask)
        part = {
            key: each[:-1] if isinstance(each, Tensor) and each.ndim and len(each) == count else each
            for key, each in batch.items()
        }
        modules = dict(self._model.named_modules())
        handles = [
            modules[name].register_forward_hook(self._noting(name, mask[:-1]))
            for name in self._names
            if name in modules and name not in self._images
        ]
        state = ModuleState(self._model)
        try:
            # a part may be what the model cannot run; then the user is asked where it matters
            with torch.no_grad(), suppress(CalibrationError):
                run(fresh(part))
                self._learned = True
        finally:
            for handle in handles:
                handle.remove()
            state.restore()

    def _noting(self, name: str, mask: Tensor) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            made = next(tensors_of(output), None)
            if made is not None:
                self._note_layout(name, mask, made.shape[:-1])

        return note

    def _note_layout(self, name: str, mask: Tensor, lead: torch.Size) -> None:
        ways = self._ways(mask, lead)
        if len(ways) == 1:
            self._layouts[name] = next(iter(ways))

    def _choose(self, name: str, x: Tensor) -> Tensor | None:
        if not self._sources:
            return None
        if self._tracker is None:
            return self._sources[0].mask
        places = self._tracker.places(x)
        if places:
            return self._sources[min(places)].mask
        for source in self._sources:
            if source.mask is not None and _hides(source.mask) and self._ways(source.mask, x.shape[:-1]):
                raise CalibrationError(
                    f"{name or 'the model'}: it cannot be told what its input of shape {tuple(x.shape)} is made of in "
                    f"batch {self._batch}, and so whether an attention mask of shape {tuple(source.mask.shape)} "
                    f"speaks of its rows; {_ASK}"
                )
        return None

    @staticmethod
    def _ways(mask: Tensor, lead: torch.Size) -> dict[str, Tensor]:
        """The mask [B, T] over the leading dimensions of an input, in every way that it may be meant."""
        texts, tokens = mask.shape
        ways = {}
        if tuple(lead[:2]) == (texts, tokens):
            ways["batch first"] = mask
        if tuple(lead[:2]) == (tokens, texts):
            ways["tokens first"] = mask.T
        if len(lead) == 3 and (lead[0], lead[2]) == (texts, tokens):
            ways["heads between"] = mask[:, None, :].expand(lead)
        if len(lead) == 1 and lead[0] == texts * tokens:
            ways["flat, batch first"] = mask.flatten()
            ways["flat, tokens first"] = mask.T.flatten()
        return ways

    def _fit(self, name: str, mask: Tensor, x: Tensor) -> Tensor | None:
        ways = self._ways(mask, x.shape[:-1])
        if len(ways) <= 1 or _all_alike(list(ways.values()), x.shape[:-1]):
            return next(iter(ways.values()), None)
        known = self._layouts.get(name)
        if known in ways:
            return ways[known]
        flat = "flat, batch first"
        if flat in ways and "tokens first" not in self._layouts.values():
            return ways[flat]
        raise CalibrationError(
            f"{name or 'the model'}: it cannot be told which axes of its input of shape {tuple(x.shape)} the "
            f"attention_mask of shape {tuple(mask.shape)} in batch {self._batch} speaks of "
            f"({' or '.join(ways)}); {_ASK}, or begin with a batch of other sizes"
        )


def _leading(mask: Tensor, x: Tensor) -> Tensor | None:
    """A mask of the leading dimensions of ``x`` [..., features], or of what was flattened to them; else None."""
    if x.shape[:-1][: mask.ndim] == mask.shape:
        return mask
    return mask.flatten() if x.ndim == 2 and x.shape[0] == mask.numel() else None


def _is_ambiguous(mask: Tensor) -> bool:
    return mask.shape[0] == mask.shape[1] and not torch.equal(mask, mask.T)


def _all_alike(masks: list[Tensor], lead: torch.Size) -> bool:
    whole = [each.reshape(*each.shape, *[1] * (len(lead) - each.ndim)).expand(lead) for each in masks]
    return all(torch.equal(whole[0], each) for each in whole[1:])


def _hides(mask: Tensor | None) -> bool:
    return mask is not None and not bool(mask.all())


def _checked(masks: object) -> Masks:
    if masks is None or isinstance(masks, Tensor):
        return None if masks is None else masks.bool()
    if isinstance(masks, Mapping) and all(each is None or isinstance(each, Tensor) for each in masks.values()):
        return {glob: None if each is None else each.bool() for glob, each in masks.items()}
    raise CalibrationError(
        f"mask(batch) gave a {type(masks).__name__}; allowed are a tensor, None to count every row, and a mapping from "
        "globs on layer names to these"
    )


def _sources(batch: Mapping[str, Any], has_decoder: bool) -> list[_Source]:
    """The parts of a batch that have rows of their own, the decoder's first, then those of the attention mask."""
    text_mask, decoder_mask = (_attention(batch, key) for key in (_MASK, _DECODER_MASK))
    if text_mask is None and decoder_mask is None:
        return []
    tensors = {
        key: each for key, each in batch.items() if isinstance(each, Tensor) and key not in (_MASK, _DECODER_MASK)
    }
    text = [key for key in _TEXT if key in tensors]
    if not text and text_mask is not None:
        free = [key for key in tensors if key != "labels" and not key.startswith("decoder_")]
        text = [key for key in free if tensors[key].shape[:2] == text_mask.shape][:1]
    decoding = has_decoder or decoder_mask is not None or any(key.startswith("decoder_") for key in tensors)
    # labels become a decoder's ids, and reach no layer of other models
    decoder = [key for key in tensors if key.startswith("decoder_") or key == "labels"] if decoding else []
    others = [key for key in tensors if key not in (*text, *decoder, *_BESIDE_TEXT, "labels")]
    if text_mask is not None and text and tensors[text[0]].ndim >= 2:
        # keys and values given with the batch have columns of the mask before those of the ids
        behind = text_mask.shape[1] - tensors[text[0]].shape[1]
        if behind > 0 and text_mask.shape[0] == tensors[text[0]].shape[0] and batch.get("past_key_values") is not None:
            text_mask = text_mask[:, behind:]
    sources = [_Source(tuple(tensors[key] for key in text), text_mask)]
    if decoding:
        sources.insert(0, _Source(tuple(tensors[key] for key in decoder), decoder_mask))
    if others:
        sources.append(_Source(tuple(tensors[key] for key in others), None))
    return sources


def _attention(batch: Mapping[str, Any], key: str) -> Tensor | None:
    mask = batch.get(key)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise CalibrationError(
            f"{key} is of {got}; allowed is [B, T]; pass mask=lambda batch: ... to say which tokens are real"
        )
    return mask.bool()


def _decoder_of(model: nn.Module) -> nn.Module | None:
    """The decoder of an encoder-decoder that says so, as those of Hugging Face do, be it inside a module around it."""
    for part in model.modules():
        getter = getattr(part, "get_decoder", None)
        if not callable(getter) or not getattr(getattr(part, "config", None), "is_encoder_decoder", False):
            continue
        with suppress(AttributeError, NotImplementedError, TypeError):
            decoder = getter()
            if isinstance(decoder, nn.Module) and decoder is not part:
                return decoder
    return None


_IN_PLACE = frozenset(("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ior__", "__iand__"))


class _Tracker(TorchFunctionMode):
    """Notes for every tensor which sources it was made of, however it was made."""

    def __init__(self, sources: Mapping[int, tuple[Tensor, ...]]) -> None:
        super().__init__()
        self._made_of = WeakIdKeyDictionary()
        for place, tensors in sources.items():
            for tensor in tensors:
                self._mark(tensor, frozenset((place,)))

    def places(self, x: Tensor) -> frozenset[int]:
        found: frozenset[int] = self._made_of[x] if x in self._made_of else frozenset()  # noqa: SIM401 (untyped get)
        return found

    def enters_decoder(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the decoder takes first has rows of the decoder's, also if it was made of the encoder's ids."""
        first = args[:1] or [kwargs[key] for key in _TEXT if isinstance(kwargs.get(key), Tensor)]
        for tensor in tensors_of(first):
            self._mark(tensor, frozenset((0,)))

    def _mark(self, tensor: Tensor, places: frozenset[int]) -> None:
        self._made_of[tensor] = self.places(tensor) | places

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        places = frozenset[int]().union(*(self.places(each) for each in tensors_of((args, kwargs))))
        result = func(*args, **kwargs)
        if places:
            for tensor in tensors_of(result):
                self._mark(tensor, places)
            name = getattr(func, "__name__", "")
            if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
                for tensor in tensors_of(args[:1]):
                    self._mark(tensor, places)
            for tensor in tensors_of(kwargs.get("out")):
                self._mark(tensor, places)
        return result

"""The interface between style methods and the engine.

A style is an immutable description of what it adds to a picture. The engine asks it for four things, each of which is
"nothing" unless the class overrides it: prompts per branch and step (`Style.write_prompts`), columns of the rows
(`Style.write_rows`), references that its rows read (`ReferenceStyle`), and pictures as prompts (`ImageStyle`). A new
method is one class in one file: subclassing `Style` registers it, so that requests, records and request files know it
by its name. docs/styles.md has an example.
"""

import importlib
import importlib.metadata
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch

from stylefast import values
from stylefast.errors import StyleError, StyleFastError
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.layout import AttentionLayout
from stylefast.models.row_table import COLUMNS, KeyValue
from stylefast.models.text import Prompt
from stylefast.sampling.guidance import NULL, StyleContextGuidance
from stylefast.values import quoted

if TYPE_CHECKING:
    from stylefast.styles.bank import StyleBank

logger = logging.getLogger(__name__)

# modules that define the package's own styles, imported when a style is looked up by name
_OWN = ("style_aligned", "instant_style", "dream_styler")
# installed packages name modules with further styles in this group of entry points
ENTRY_POINTS = "stylefast.styles"


@dataclass(frozen=True)
class References:
    """References that the rows of a style's pictures read.

    They are the pages of a `bank`; or the real `pictures`, noised at each step; or a picture of `prompt`, generated
    with its readers; or, without any of these, the first picture of the call that carries the style.
    """

    bank: "StyleBank | None" = None
    pictures: Sequence[Any] = ()
    prompt: str | None = None
    seed: int = 0
    noise: str = "forward"  # or "ddim", of real pictures: see `runtime/plan/pinning.py`
    inversion_guidance: float = 1.0
    share_styles: bool = True  # whether the request's other styles apply to the reference too
    mutual: bool = False  # all pictures with the style read one another
    calibrate: float = 0.0  # share, 0 to 1, of the first reference's colours that readers take in late steps

    def __post_init__(self):
        if not isinstance(self.pictures, (list, tuple)) or any(picture is None for picture in self.pictures):
            raise StyleError(f"a reference's pictures are {quoted(self.pictures)}; they must be a list of pictures")
        if self.bank is not None and not hasattr(self.bank, "info"):
            raise StyleError(f"a reference's bank is {quoted(self.bank)}; it must be a StyleBank")
        values.one_of("a reference's noise", self.noise, ("forward", "ddim"), error=StyleError)
        values.whole_number("a reference's seed", self.seed, error=StyleError)
        values.real_number("a reference's calibrate", self.calibrate, 0, 1, error=StyleError)

    @property
    def of_call(self) -> bool:
        """Return whether the reference is the call's first picture with the style."""
        return self.bank is None and not self.pictures and self.prompt is None


# the arrays that styles write, by name, and the columns of the row table that they are made for
_STYLED = {
    name if column.styled is True else column.styled: column for name, column in COLUMNS.items() if column.styled
}


class Rows:
    """Arrays [rows, ...] of one group's rows that styles write: one for each styled column of `row_table.COLUMNS`.

    Their dimensions are the column's, without the references. `takes_adain` and `takes_norms` [rows] bool say whether
    a row takes AdaIN's and the group norms' page from its first reference. `own_shifts` [rows] holds what a row adds to
    `self_shift` for each of its references, [references]; None: nothing.
    """

    __slots__ = ("arrays", "own_shifts")

    def __init__(self, arrays: Mapping[str, np.ndarray], own_shifts: Sequence[np.ndarray | None]):
        self.arrays, self.own_shifts = arrays, list(own_shifts)

    @classmethod
    def idle(cls, count: int, layers: int) -> "Rows":
        """Return `count` rows with idle values."""
        sizes, arrays = {"rows": count, "layers": layers}, {}
        for name, column in _STYLED.items():
            if isinstance(column.styled, str):
                arrays[name] = np.zeros(count, bool)
            else:
                own = column._replace(dims=tuple(dim for dim in column.dims if dim != "references"))
                arrays[name] = own.filled(own.shape(sizes)).numpy()
        return cls(arrays, [None] * count)

    @classmethod
    def joined(cls, parts: Sequence["Rows"], order: np.ndarray) -> "Rows":
        """Return the rows of several groups as one, in the given order."""
        shifts = [shift for part in parts for shift in part.own_shifts]
        arrays = {name: np.concatenate([part.arrays[name] for part in parts])[order] for name in _STYLED}
        return cls(arrays, [shifts[row] for row in order])

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in _STYLED:
            raise AttributeError(f"styles write the rows' {', '.join(_STYLED)}; there is no {quoted(name)}")
        return self.arrays[name]

    def write(self, table: Mapping[str, np.ndarray], references: np.ndarray) -> None:
        """Write the values into the first rows of an idle table; references [rows]: how many each row reads."""
        for name, column in COLUMNS.items():
            if column.styled is True:
                values = self.arrays[name]
                target = table[name][: len(values)]
                if "references" in column.dims:
                    used = np.arange(target.shape[1]) < references[:, None]
                    np.copyto(target, values[:, None], where=used)
                else:
                    target[:] = values
        for row, shifts in enumerate(self.own_shifts):
            if shifts is not None:
                table["self_shift"][row, : len(shifts)] += shifts

    def write_pages(self, table: Mapping[str, np.ndarray], first: np.ndarray) -> None:
        """Write the pages that rows take from their first references, `first` [rows], into the same rows."""
        for name, column in COLUMNS.items():
            if isinstance(column.styled, str) and len(table[name]):
                np.copyto(table[name][: len(first)], first, where=self.arrays[column.styled])


@dataclass
class Texts:
    """The prompts of one picture: those of `branches` in each step. Styles change `per_step` and `pooling`."""

    prompt: str  # from the request; empty for a real picture without a caption
    negative_prompt: str
    timesteps: torch.Tensor  # [steps], within the training range
    train_timesteps: int
    branches: Sequence[str]
    say: bool = True  # whether to log warnings
    prompt_2: str | None = None  # for text encoder 2; None: the same
    negative_prompt_2: str | None = None
    syntax: str = "plain"  # of all texts
    begin: int = 0  # the first step that runs, of a picture that begins with one
    per_step: dict[str, list[Prompt]] = field(init=False)
    pooling: dict[str, str] = field(init=False)  # by branch: where the pooled state is taken

    def __post_init__(self):
        plain = {branch: self._prompt(branch) for branch in self.branches}
        self.per_step = {branch: [prompt] * len(self.timesteps) for branch, prompt in plain.items()}
        self.pooling = dict.fromkeys(self.branches, "eos")

    @classmethod
    def of(
        cls,
        request: Any,
        prompt: str,
        timesteps: torch.Tensor,
        train_timesteps: int,
        branches: Sequence[str],
        say: bool = True,
        begin: int = 0,
    ) -> "Texts":
        """Return the texts of a request's picture, or of its reference with a `prompt` of its own."""
        second = request.prompt_2, request.negative_prompt_2
        negative = request.negative_prompt
        return cls(prompt, negative, timesteps, train_timesteps, branches, say, *second, request.prompt_syntax, begin)

    @property
    def negatives(self) -> str:
        """Return the negative prompts for both text encoders, one after the other."""
        return " ".join([self.negative_prompt, self.negative_prompt_2 or ""])

    def _prompt(self, branch: str) -> Prompt:
        if branch != NULL:
            return Prompt(self.prompt, text_2=self.prompt_2, syntax=self.syntax)
        if self.negative_prompt or self.negative_prompt_2:
            return Prompt(self.negative_prompt, text_2=self.negative_prompt_2, syntax=self.syntax)
        return Prompt(None, syntax=self.syntax)

    def check(self, kind: type["Style"]) -> None:
        """Raise StyleError unless styles of `kind` left a Prompt for each branch and step, with all that it had."""
        steps = len(self.timesteps)
        for branch in self.branches:
            found = self.per_step.get(branch)
            if not isinstance(found, list) or len(found) != steps or not all(isinstance(p, Prompt) for p in found):
                raise StyleError(
                    f"the style {kind.__name__} must write a list of {steps} Prompts, one for each step, for the "
                    f"branch {values.quoted(branch)}"
                )
            plain = self._prompt(branch)
            lost = [prompt for prompt in found if prompt.text is not None and prompt.syntax != self.syntax]
            lost += [prompt for prompt in found if plain.text_2 is not None and prompt.text_2 is None]
            if lost:
                raise StyleError(
                    f"the style {kind.__name__} wrote prompts of the branch {values.quoted(branch)} without the "
                    "request's syntax or its text for encoder 2; change them with dataclasses.replace(prompt, "
                    "text=..., text_2=...)"
                )
        if unknown := {*self.per_step} - {*self.branches}:
            raise StyleError(
                f"the style {kind.__name__} wrote prompts of the branch {values.quoted(min(unknown))}; the picture has "
                f"{', '.join(self.branches)}"
            )


@dataclass(frozen=True)
class ModelFacts:
    """Facts about the model that a style may use."""

    layout: AttentionLayout
    trained_on_noise_levels: str | None  # the class of its scheduler, if it has no training timesteps


_kinds: dict[str, type["Style"]] = {}


def _import_own() -> list[str]:
    """Import the package's own styles; return the names of their modules."""
    return [importlib.import_module(f"stylefast.styles.{module}").__name__ for module in _OWN]


def _same_module(one: type, other: type) -> bool:
    return one.__module__ == other.__module__ or "__main__" in (one.__module__, other.__module__)


class Style:
    """Base class of all styles. Subclasses are frozen dataclasses whose fields are the style's arguments."""

    __dataclass_fields__: ClassVar[dict[str, Field]]
    window: tuple[float, float] = (0.0, 1.0)  # fractions of the steps in which rows are written and pictures act
    option: ClassVar[str | None] = None  # short name on the command line
    aliases: ClassVar[Mapping[str, str]] = {}  # other names of fields in request files
    # names under which a server's clients give fields that the server keeps, such as {"bank": "reference"}
    served: ClassVar[Mapping[str, str]] = {}
    picture_fields: ClassVar[Sequence[str]] = ()
    mask_fields: ClassVar[Sequence[str]] = ()

    def __init_subclass__(cls, base: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        if base:
            return
        if not cls.__module__.startswith("stylefast.styles."):
            _import_own()  # modules whose style names are taken
        other = _kinds.get(cls.__name__)
        # a program that is run and imported is two modules, one of which is called __main__
        same = other is not None and other.__qualname__ == cls.__qualname__
        if other is not None and not (same and _same_module(other, cls)):
            raise StyleError(f"{cls.__module__} and {other.__module__} define a style {cls.__name__}; rename one")
        _kinds[cls.__name__] = cls

    def check(self, model: ModelFacts) -> None:
        """Raise StyleError if the style doesn't fit the model, before anything runs."""

    @classmethod
    def check_texts(cls, styles: Sequence[Any], texts: Texts) -> None:
        """Raise PromptError or StyleError if a request's styles of this class and its texts don't fit together."""

    @property
    def context_guidance(self) -> StyleContextGuidance | None:
        """Return weights for the branches "style" and "context", which the picture then has, or None."""
        return None

    @classmethod
    def write_prompts(cls, styles: Sequence[Any], texts: Texts) -> None:
        """Change the prompts of a picture; `styles` are all of its styles of this class."""

    def write_rows(self, rows: Rows, row: int, layout: AttentionLayout, leads: bool) -> None:
        """Write the columns of one row at steps within `window`.

        Args:
            leads: whether the row belongs to the first of several pictures that read one another.
        """

    def active(self, step: int, steps: int) -> bool:
        """Return whether step `step` of `steps` lies within the window."""
        start, end = self.window
        return start <= step / steps < end

    def named_in(self, text: str) -> bool:
        """Return whether a text names the style, by a placeholder."""
        return False

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Return the style's own texts that are encoded, each with a description: ("the style's prompt", "neon")."""
        return []

    @property
    def placeholders(self) -> list[str]:
        """Return the placeholders that prompts may contain."""
        return []

    def write_field(self, name: str, value: Any, store: Any) -> Any:
        """Return a field's value for a record, as `json.dumps` accepts it; store: a `record_values.Store`."""
        if name in (*self.picture_fields, *self.mask_fields):
            many = isinstance(value, (list, tuple))
            entries = [store.picture(one, name in self.mask_fields) for one in (value if many else [value])]
            return entries if many else entries[0]
        return store.tensor(value) if isinstance(value, torch.Tensor) else store.plain(value)

    @classmethod
    def read_field(cls, name: str, value: Any, sources: Any) -> Any:
        """Return a field's value from its recorded form; sources: a `record_values.Sources`.

        Files and pictures must be read through `sources`, which on a server has only those that clients may use.
        """
        if name in (*cls.picture_fields, *cls.mask_fields):
            many = isinstance(value, (list, tuple))
            found = [sources.picture(one, name in cls.mask_fields) for one in (value if many else [value])]
            return found if many else found[0]
        if isinstance(value, Mapping) and "sha256" in value and {*value} <= {"sha256", "safetensors", "in_memory"}:
            return sources.tensor(value)
        # records hold infinities as text, since JSON has none
        number = isinstance(getattr(cls, name, None), float) or "float" in str(cls.__annotations__.get(name))
        return float(value) if number and isinstance(value, str) and value in ("inf", "-inf") else value

    def check_recorded(self, entry: Mapping[str, Any], sources: Any) -> None:
        """Raise StyleError if the data that the style read differ from its record."""


class ReferenceStyle(Style, base=True):
    """Base class of styles whose rows read references; a request takes one. It writes only those rows."""

    @property
    def reads(self) -> References:
        """Return the references; unless overridden, the call's first picture with the style."""
        return References()

    def layer_mask(self, layout: AttentionLayout) -> torch.Tensor:
        """Return the layers in which rows read references, [layers] bool."""
        return torch.ones(len(layout.layers), dtype=torch.bool)


class ImageStyle(Style, ABC, base=True):
    """Base class of styles with pictures as prompts: segments of tokens that rows see through an IP-Adapter."""

    adapter: str | None = None  # name of the adapter; None: the engine's only one

    @property
    @abstractmethod
    def segments(self) -> Sequence[Any]:
        """Return the segments (`instant_style.Segment`), each of which has its tokens, a mask and a strength."""

    @abstractmethod
    def check_adapter(self, adapter: IPAdapter, text_dim: int) -> None:
        """Raise AdapterError or StyleError if the style doesn't fit; text_dim: width of text embeddings."""

    @abstractmethod
    def strengths(self, layout: AttentionLayout, guided: bool, segment: int = 0) -> Any:
        """Return the weights of a segment per attention module, as `instant_style.Strengths`."""

    @abstractmethod
    def tokens(self, adapter: IPAdapter, encoder: ImageEncoder, content: torch.Tensor | None = None) -> Any:
        """Return the tokens of all segments and of unconditional rows, as `instant_style.StyleTokens`."""

    @property
    def own_negative(self) -> bool:
        """Return whether unconditional rows see tokens other than the adapter's."""
        return False

    def variants(self, steps: int) -> Sequence[Hashable]:
        """Return, for each of `steps`, what the keys and values of its pictures depend on besides the picture."""
        return (None,) * steps

    @property
    def varies(self) -> bool:
        """Return whether its pictures' keys and values depend on the step, or unconditional rows see them."""
        return self.unconditional is not None or self.variants(1) != (None,)

    @property
    def unconditional(self) -> Hashable:
        """Return the variant of its own pictures that unconditional rows see; None: they see the negative tokens."""
        return None

    def vary(
        self, layers: Sequence[KeyValue | None], segment: int, variants: Sequence[Hashable], each: int
    ) -> list[list[KeyValue | None]]:
        """Return keys and values of all layers for each variant; each: tokens of one picture."""
        return [list(layers) for _ in variants]

    @property
    def needs_encoder(self) -> bool:
        """Return whether pictures go through the adapter's image encoder."""
        return True

    @property
    def content_text(self) -> str | None:
        """Return words whose text embedding `tokens` takes as `content`."""
        return None


Settings = TypeVar("Settings")


def read_settings(name: str, value: Any, kind: type[Settings]) -> Settings:
    """Return a dataclass of settings from a record's dictionary of them. Raises StyleError, or what `kind` raises."""
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(value, Mapping):
        raise StyleError(f"{name} is {quoted(value)}; it must be a dictionary of {', '.join(names)}")
    values.check_fields(name, value, names)
    return kind(**value)


def checked_weights(weights: Any) -> tuple[float, ...]:
    """Return the relative weights of several pictures. Raises StyleError unless they are positive numbers."""
    found = values.several("weights", weights, least=1, error=StyleError)
    high = values.MAX_STRENGTH
    checked = tuple(values.real_number(f"weights[{i}]", one, 0, high, error=StyleError) for i, one in enumerate(found))
    if min(checked) <= 0:
        raise StyleError(f"weights is {values.quoted(list(checked))}; all must be above 0, so leave the picture out")
    return checked


def kinds() -> dict[str, type[Style]]:
    """Return the styles by class name: the package's own, then others that were imported."""
    own = _import_own()
    place = {module: i for i, module in enumerate(own)}
    return dict(sorted(_kinds.items(), key=lambda item: place.get(item[1].__module__, len(own))))


def find_kind(name: Any) -> type[Style]:
    """Return the style with a name, in any spelling ("InstantStyle", "instant_style") or short ("instant").

    If no imported style has it, the modules named by installed packages are imported. Raises StyleError.
    """
    wanted = str.__str__(name) if isinstance(name, str) else None
    for load in (lambda: None, _load_installed):
        load()
        found = kinds()
        for known, kind in found.items():
            if known == wanted or _squeezed(known) == _squeezed(wanted) != "":
                return kind
    for kind in found.values():  # after all full names, which may be the same
        if kind.option is not None and kind.option == wanted:
            return kind
    raise StyleError(
        f"style kind {quoted(name)} is unknown; choose one of {', '.join(found)}{values.did_you_mean(name, found)}"
    )


@cache
def _load_installed() -> None:
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry_point.load()
        except Exception:  # another package's code: whatever it raises, other styles must be found
            logger.exception("the style %s of an installed package can't be loaded", entry_point.name)


def style_of_option(option: str) -> Callable[..., Style]:
    """Return the style with a short name on the command line. Raises StyleError."""
    for kind in kinds().values():
        if kind.option == option:
            return kind
    raise StyleError(f"no style has the short name {quoted(option)}")


@cache
def check_kind(kind: type[Style]) -> None:
    """Raise StyleError for a class that can't be a style: not a frozen dataclass, `eq` on, reserved fields."""
    if not is_dataclass(kind) or kind.__hash__ is not object.__hash__:
        raise StyleError(f"the style {kind.__name__} must be a @dataclass(frozen=True, eq=False); see docs/styles.md")
    taken = {"kind", "type"} & {f.name for f in fields(kind)}
    if taken:
        raise StyleError(
            f"the style {kind.__name__} has a field {values.quoted(min(taken))}, which records use for the class name; "
            "rename the field"
        )


@contextmanager
def asking(kind: type[Style], what: str) -> Iterator[None]:
    """Turn unexpected errors of a style's code into a StyleError that names it."""
    try:
        yield
    except (StyleFastError, MemoryError):
        raise
    except Exception as error:
        raise StyleError(
            f"the style {kind.__name__} failed in {what}: {type(error).__name__}: {quoted(str(error))}"
        ) from error


def by_kind(styles: Sequence[Style]) -> dict[type[Style], list[Style]]:
    """Return styles by the class whose `write_prompts` they have, in order."""
    found: dict[type[Style], list[Style]] = {}
    for style in styles:
        owner = next(kind for kind in type(style).__mro__ if "write_prompts" in vars(kind))
        found.setdefault(owner, []).append(style)
    return found


def _squeezed(name: Any) -> str:
    return name.replace("_", "").replace("-", "").replace(" ", "").lower() if isinstance(name, str) else ""

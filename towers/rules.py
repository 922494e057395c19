"""[towers] and [training]: the shape of the towers and how they learn, as checked values.

A section whose `kind` decides which keys exist (`[towers.history]`, `[training.negatives]`,
`[training.id_init]`) is one class a kind.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from recsys.metrics import hit_rate_at, ndcg_at, recall_at
from recsys.split import duration
from recsys.tables import AS_TUPLE, Strict, of_kind

if TYPE_CHECKING:
    from torch import nn

LENGTH_SCORES = ("dot", "projection")
"""Scores to which an item's length counts."""


def _span(text: str | None) -> str | None:
    if text is not None and duration(text) < 1:
        raise ValueError(f"{text!r} is no time at all; write for example '1h'")
    return text


Span = Annotated[str | None, AfterValidator(_span)]
"""A span of time such as "10m", "3h" or "30d"."""
"""`of_kind` takes a section from JSON, whose lists are tuples, to Python, whose lists are not."""


# ---------------------------------------------------------------------------------- [towers]


class NoHistory(Strict):
    """[towers.history] kind = "none": users are their id, features and context."""

    kind: Literal["none"] = "none"

    @property
    def length(self) -> int:
        """Newest items read: one, which nothing reads."""
        return 1

    @property
    def inputs(self) -> tuple[str, ...]:
        """Nothing is read beside the items."""
        return ()

    @property
    def table(self) -> str:
        """Histories have no id vectors of their own."""
        return "shared"


class _History(Strict):
    length: int = Field(50, ge=1)
    """Newest items read."""
    inputs: Annotated[tuple[Literal["recency", "weight"], ...], AS_TUPLE] = ()
    """What is read of a history's events beside the items: how long ago, and the event's weight
    (its strength, such as a dwell time)."""
    table: Literal["shared", "offset", "own"] = "shared"
    """shared: histories read the item tower's own vectors; offset: plus a learned vector of each
    item that starts at zero, so that what an item says of its user may drift from what it is found
    by; own: with a second id vector of each item in place of the first."""


class MeanHistory(_History):
    """[towers.history] kind = "mean": a weighted mean of the items' vectors."""

    kind: Literal["mean"] = "mean"
    decay: float = Field(0.0, ge=0, le=10)
    """An entry weighs (1 + entries after it) ** -decay, so that what came last says most; 0: all
    alike. 1.25 was best on check-ins."""


class AttentionHistory(_History):
    """[towers.history] kind = "attention": a softmax over content and position weighs the items."""

    kind: Literal["attention"] = "attention"


class TransformerHistory(_History):
    """[towers.history] kind = "transformer": a causal transformer reads the items in order."""

    kind: Literal["transformer"] = "transformer"
    layers: int = Field(1, ge=1, le=8)
    """Blocks of attention and feed-forward layer."""
    heads: int = Field(1, ge=1, le=64)
    """Attention heads; twice their number divides the dimension."""
    hidden: int = Field(256, ge=1)
    """Width of the feed-forward layers."""
    entry_dropout: float | None = Field(None, ge=0, lt=1)
    """Probability that a dimension of a history's entry is zeroed in training; None: as
    `towers.dropout`."""


class CustomHistory(_History):
    """[towers.history] kind = "custom": a torch module of one's own, see docs/examples/tower.py."""

    kind: Literal["custom"] = "custom"
    module: str
    """Its class as "module:Class", found by Python where towers are trained and where they answer;
    called with the dimension and the length."""

    @field_validator("module")
    @classmethod
    def _is_a_module(cls, value: str) -> str:
        history_class(value)
        return value


def history_class(name: str) -> type[nn.Module]:
    """The torch module that "module:Class" names.

    Raises:
        ValueError: there is no such class, or it is no torch module.
    """
    from torch import nn

    found = imported(name, 'a class of your own as "module:Class"')
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{name!r} is no class of torch modules")
    return found


History = Annotated[
    NoHistory | MeanHistory | AttentionHistory | TransformerHistory | CustomHistory,
    Field(discriminator="kind"),
    of_kind("attention"),
]


class TowerRules(Strict):
    """[towers]: the shape of the two networks."""

    dimension: int = Field(64, ge=2, le=4096)
    """Of the vectors that are compared."""
    ensemble: int = Field(1, ge=1, le=64)
    """Towers side by side, each with its part of the dimensions; an item's score is the mean of
    their cosines, and they learn by that mean. Where one tower learns a small log by heart, more
    towers of the same size rank better, and more dimensions do not."""
    score: Literal["cosine", "dot", "projection"] = "cosine"
    """cosine: direction alone; dot: lengths of both count, and an item's carries its popularity;
    projection: an item's length counts, a user's does not, so that no user learns louder than
    another."""
    history: History = Field(default_factory=AttentionHistory)
    """How the user's earlier items become one vector."""
    user_id: bool = False
    """A vector of its own for every user of the training side; new users have only the rest."""
    id_dropout: float = Field(0.2, ge=0, le=1)
    """Probability that an item's id is hidden in training, so that new items work from content; 1:
    items have no id vectors."""
    cooccurrence_neighbours: int = Field(0, ge=0, le=100_000)
    """Of an item with an id, the item tower reads its neighbourhood in the co-occurrence graph as
    well: the mean id vector of at most so many items that came shortly before it in histories (a
    graph convolution), its number of events, and how near to the ends of histories they are. So an
    item of few events is placed by its neighbours, and fresh items can be told from faded ones
    where a log has no clock. In training the users of the batch are left out of all of it. 0: its
    id alone."""
    text_neighbours: int = Field(0, ge=0, le=1000)
    """The item tower reads the mean id vector of so many items with the most similar texts, too:
    so what is seldom, or new, is placed by its like. Every text is compared with every other once a
    training, which for a million items is long. 0: its own id alone."""
    hidden: int = Field(128, ge=0)
    """Width of each tower's residual layer; 0: none, which overfits least on very small logs."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Probability that an activation is zeroed in training."""
    text_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a dimension of an item's text vector is zeroed in training, so that the
    texts of known items are not learned by heart."""
    text_share: float = Field(0.0, ge=0, lt=1)
    """Share of the score that is the plain cosine of an item's text and those of the history, the
    newest of which weigh most; the rest is what the towers learned, without it. So new items are
    found by their texts themselves, however well the towers know the old ones by heart. Stored
    vectors are longer by the text's dimensions. Best with text.views that hold "cooccurrence"."""
    example_age: int = Field(0, ge=0, le=1000)
    """In training, the user tower reads how many events of its user came after the example, up to
    this number; when answering there is none, and half a step is taken beyond the newest. So it
    learns what was chosen when, and answers for what comes next (the example age of Covington et
    al., 2016, counted in events). 0: not read."""
    statistics: bool | Literal["auto"] = "auto"
    """Item age, clicks and impressions as of the event; auto: when the log has impressions."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ensemble > 1:
            if self.dimension % self.ensemble or self.dimension // self.ensemble < 2:
                raise ValueError(
                    f"{self.ensemble} towers share {self.dimension} dimensions: make the dimension "
                    "a multiple of the ensemble, at least twice as large."
                )
            if self.score != "cosine":
                raise ValueError(
                    f"ensemble = {self.ensemble} is a mean of cosines, which does not go with "
                    f'score = "{self.score}": set it to "cosine", or ensemble to 1.'
                )
        history = self.history
        if isinstance(history, TransformerHistory) and self.width % (2 * history.heads):
            raise ValueError(
                f"{history.heads} heads need a dimension that {2 * history.heads} divides, and it "
                f"is {self.width}: change history.heads or dimension."
            )
        if self.text_share and (self.score != "cosine" or history.kind == "none"):
            raise ValueError(
                "text_share is a share of a cosine between a history and an item: leave score at "
                '"cosine", take mean, attention or transformer as history, or leave text_share '
                "at 0."
            )
        for name in ("cooccurrence_neighbours", "text_neighbours"):
            if getattr(self, name) and (not self.item_ids or history.table == "own"):
                raise ValueError(
                    f"{name} = {getattr(self, name)} is read of items beside their ids, once: set "
                    f'id_dropout below 1, history.table to another than "own", or {name} to 0.'
                )
        if history.table != "shared" and not self.item_ids:
            raise ValueError(
                f'history.table = "{history.table}" learns a vector of each item, and id_dropout '
                '= 1 leaves them out: set it lower, or history.table to "shared".'
            )
        return self

    @property
    def width(self) -> int:
        """Dimensions of one tower of the ensemble."""
        return self.dimension // self.ensemble

    @property
    def item_ids(self) -> bool:
        """Whether items have id vectors."""
        return self.id_dropout < 1


# -------------------------------------------------------------------------------- [training]


class MiningRules(Strict):
    """[training.mined]: hard negatives from the top of the current model's own ranking."""

    per_query: int = Field(0, ge=0)
    """Negatives of each user; 0: nothing is mined. NV-Retriever takes no more than 10."""
    from_rank: int = Field(100, ge=0)
    """So many of the best are left alone, for they may be liked."""
    to_rank: int = Field(500, ge=1)
    """Deepest rank that is looked at."""
    weight: float = Field(1.0, gt=0)
    """How many items a mined negative counts as. With logq the sampled ones together count as the
    whole catalogue (19,000 items: 8 mined ones of weight 1 have .3 % of the gradient), so that far
    more than 1 is needed for them to be felt; the audit says how much they are."""

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.from_rank >= self.to_rank:
            raise ValueError(
                f"from_rank is {self.from_rank} and to_rank {self.to_rank}: nothing is between."
            )
        return self


def _number(value: object) -> object:
    return float(value) if isinstance(value, bool) else value


class SampledNegatives(Strict):
    """[training.negatives] kind = "sampled": other examples' items, uniform draws and the queue."""

    kind: Literal["sampled"] = "sampled"
    uniform: int = Field(0, ge=0)
    """Candidates sampled uniformly for the whole batch, beside the other examples' items."""
    queue: int = Field(0, ge=0)
    """So many earlier batches' candidates stand beside today's, with the vectors they had
    (cross-batch negatives; Wang et al., 2021)."""
    logq: Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)] = 1.0
    """Correct sampled negatives by their inclusion probability to this power. 1 (or true): the
    score says what is likely. 0 (or false): how much likelier than its popularity an item is.
    Between them popular items are taken down a little, which helps new ones into the lists."""
    file: str | None = None
    """Negatives of users from a file beside them: columns user, item and perhaps weight (how many
    items a pair counts as; 1 where the file has none), in the ids of the log."""


class AllNegatives(Strict):
    """[training.negatives] kind = "all": every item (full softmax), which needs no correction."""

    kind: Literal["all"] = "all"
    file: str | None = None
    """Negatives of users from a file beside them: columns user, item and perhaps weight (how many
    items a pair counts as; 1 where the file has none), in the ids of the log."""

    @property
    def uniform(self) -> int:
        """Nothing is sampled."""
        return 0

    @property
    def queue(self) -> int:
        """Nothing is sampled."""
        return 0

    @property
    def logq(self) -> float:
        """Nothing is corrected: every item is there with probability 1."""
        return 1.0


Negatives = Annotated[
    SampledNegatives | AllNegatives, Field(discriminator="kind"), of_kind("sampled")
]


class RandomInit(Strict):
    """[training.id_init] kind = "random": small noise."""

    kind: Literal["random"] = "random"


Power = Annotated[float, Field(ge=0, le=1)]


class SpectralInit(Strict):
    """[training.id_init] kind = "spectral": leading singular vectors of who had what (for sets)."""

    kind: Literal["spectral"] = "spectral"
    powers: Annotated[tuple[Power, Power, Power], AS_TUPLE] = (0.5, 0.5, 0.0)
    """[a, b, c]. An event weighs (events of its user)^-a · (events of its item)^-b in the
    decomposition, and a direction (its singular value)^c in the score. [.5, .5, 0] is the usual
    low-pass filter; a smaller a lets those who did more say more, a larger c trusts the leading
    directions more."""


class CooccurrenceInit(Strict):
    """[training.id_init] kind = "cooccurrence": leading eigenvectors of which items stand near each
    other in histories (for sequences).
    """

    kind: Literal["cooccurrence"] = "cooccurrence"


IdInit = Annotated[
    RandomInit | SpectralInit | CooccurrenceInit, Field(discriminator="kind"), of_kind("random")
]

LOSSES = ("softmax", "bsl", "triplet")
OWN_LOSS = f'{", ".join(LOSSES)}, or a function of your own as "module:function"'


class TrainingRules(Strict):
    """[training]: how the towers learn."""

    # Which examples a step sees.
    batch_size: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    """Examples of a step; users with `batches` by_user or sequences. auto: the power of two
    nearest to a hundredth of the training events, from 128 to 1024, so that a small log still gets
    a hundred steps an epoch."""
    batches: Literal["auto", "random", "in_time", "by_user", "sequences"] = "auto"
    """random: events in any order, each with the history before it. in_time: a window of
    consecutive events, which has one time for item statistics. sequences: whole users, an example
    at every position (causal towers). by_user: whole users, every item an example with the others
    as history, for logs whose order means nothing. auto: sequences for a transformer, in_time where
    item statistics need it, otherwise random."""
    since: Span = None
    """Learn from positives of so much time before the end of the training side only ("5d"); what is
    older is history. For logs whose beginning is of another kind, or long past."""
    epochs: int = Field(30, ge=0)
    """At most; early stopping usually ends sooner. 0: the initial vectors alone, of train and
    validation side together."""
    patience: int = Field(4, ge=1)
    """Epochs without a better validation metric before training stops."""
    refit: bool = True
    """Once the epoch is chosen, train again from the start on train and validation side together,
    for so many epochs: what happened last before the cut-off says most about what comes next."""
    monitor: str = "ndcg_at_20"
    """Picks the epoch: recall_at_K, ndcg_at_K or hit_rate_at_K by full ranking of the validation
    side, or auc, by how well the lists shown on it are ordered."""

    # What each example is compared with.
    negatives: Negatives = Field(default_factory=SampledNegatives)
    """Candidates that all queries of a batch share."""
    mined: MiningRules = Field(default_factory=MiningRules)
    """Hard negatives from the top of the current model's own ranking."""
    skip_weight: float = Field(0.3, ge=0)
    """Weight of a softmax of the positive against the skips of its own request, beside the main
    loss; 0: no skips."""

    # The loss.
    loss: str = "softmax"
    """softmax (InfoNCE), bsl (bilateral softmax), triplet, or a function of one's own as
    "module:function" that takes `BatchLogits` and gives a loss for each example; see
    docs/examples/losses.py."""
    symmetric: float = Field(0.0, ge=0, le=1)
    """Share of the same loss from item to user; the rest is from user to item."""
    temperature: Annotated[float, Field(gt=0)] | Literal["learned"] = 0.1
    """Divides the score. learned: from 0.1 on."""

    # How it is minimised.
    id_init: IdInit = Field(default_factory=RandomInit)
    """What id vectors are before the first step."""
    learning_rate: float = Field(2e-3, gt=0)
    """Of all but a text encoder that learns with the towers."""
    text_learning_rate: float = Field(1e-4, gt=0)
    """Of a text encoder that learns inside the item tower."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rates after the warm-up; cosine falls to zero at the last of `epochs`."""
    average: float = Field(0.0, ge=0, lt=1)
    """Validate, keep and answer by the moving average of all weights, of which a step leaves so
    much, such as 0.998: ranks a little better, and hangs less on which epoch is chosen. Takes the
    memory of a second model. 0: the weights as they are."""
    weight_decay: float = Field(1e-4, ge=0)
    """Of the dense layers' matrices, decoupled; never of the temperature, biases or id tables."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest common norm of all gradients of a step."""
    accelerator: str = "auto"
    """As Lightning's Trainer takes it: auto, cpu, gpu."""
    precision: str = "32-true"
    """As Lightning's Trainer takes it: 32-true, bf16-mixed, 16-mixed."""

    @property
    def refits(self) -> bool:
        """Whether the final towers learn from the validation side, too."""
        return self.refit or self.epochs == 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.monitor != "auc":
            metric_at(self.monitor)
        if self.loss not in LOSSES:
            imported(self.loss, OWN_LOSS)
        if self.epochs == 0 and self.id_init.kind == "random":
            raise ValueError(
                "with epochs = 0 the towers stay as they are initialised, and id_init.kind = "
                '"random" is noise: set it to "spectral" or "cooccurrence", or epochs to at '
                "least 1."
            )
        return self


def imported(name: str, wanted: str) -> Callable[..., Any]:
    """The function or class that "module:name" names.

    Args:
        name: from a configuration.
        wanted: what may stand there, in words.

    Raises:
        ValueError: the name has another form, or there is no such module or function.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{name!r} is not known; use {wanted}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from None
    if not callable(function):
        raise ValueError(f"{name!r} is a {type(function).__name__}, not a function")
    return function


def fitting_batch(rules: TrainingRules, events: int) -> int:
    """Examples of a batch, as `[training] batch_size` says for so many training events."""
    if rules.batch_size != "auto":
        return rules.batch_size
    return 2 ** round(math.log2(min(max(events / 100, 128), 1024)))


METRICS = {"recall_at": recall_at, "ndcg_at": ndcg_at, "hit_rate_at": hit_rate_at}


def metric_at(name: str) -> tuple[str, int]:
    """Split "ndcg_at_20" into its function's name and k.

    Raises:
        ValueError: no such metric.
    """
    stem, _, k = name.rpartition("_")
    if stem not in METRICS or not k.isdigit() or int(k) < 1:
        raise ValueError(
            f"{name!r} is no metric; use {', '.join(m + '_K' for m in METRICS)} or auc."
        )
    return stem, int(k)

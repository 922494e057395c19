"""[training]: how the towers learn, as one checked value."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from torch import Tensor

from recsys.metrics import hit_rate_at, ndcg_at, recall_at
from recsys.split import duration
from recsys.tables import Strict
from recsys.towers.losses import OBJECTIVES
from recsys.towers.mining import MiningRules


def _span(text: str | None) -> str | None:
    if text is not None and duration(text) < 1:
        raise ValueError(f"{text!r} is no time at all; write for example '1h'")
    return text


Span = Annotated[str | None, AfterValidator(_span)]
"""A span of time such as "10m", "3h" or "30d"."""


def _number(value: object) -> object:
    return float(value) if isinstance(value, bool) else value


Share = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]
Power = Annotated[float, Field(ge=0, le=1)]


class TrainingRules(Strict):
    """[training]: how the towers learn."""

    # Which examples a step sees.
    batch_size: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    """Examples of a step; users with `batches` by_user, ahead or sequences. auto: the power of two
    nearest to a hundredth of the training events, from 128 to 1024, so that a small log still gets
    a hundred steps an epoch."""
    batches: Literal["auto", "random", "in_time", "by_user", "ahead", "sequences"] = "auto"
    """random: events in any order, each with the history before it. in_time: a window of
    consecutive events, which has one moment for item statistics. sequences: whole users, an example
    at every position (causal towers). by_user: whole users, every item an example with the others
    as history, for logs whose order means nothing. ahead: whole users, each asked once an epoch, at
    a random one of its moments, for the `ahead` events that came next: short epochs. auto:
    sequences for a transformer, in_time where item statistics need it, otherwise random."""
    window_span: Span = None
    """in_time: a window ends when it spans so much time, however few events it holds."""
    history_dropout: float = Field(0.2, ge=0, lt=1)
    """by_user: share of a user's items left out of the history that foretells all of them."""
    ahead: int = Field(10, ge=1)
    """ahead: events from the moment on that are examples."""
    ahead_within: float = Field(1.0, gt=0, le=1)
    """ahead: moments are drawn from the last such share of a user's events, which is nearest to
    what will be asked."""
    since: Span = None
    """Learn from positives of so much time before the end of the training side only ("5d"); what is
    older is history. For logs whose beginning is of another kind, or long past."""
    half_life: Span = None
    """An event counts half when it is so much older than the newest; None: all alike."""
    epochs: int = Field(30, ge=0)
    """At most; early stopping usually ends sooner. 0: the start alone, of train and validation
    side together."""
    patience: int = Field(4, ge=1)
    """Epochs without a better validation metric before training stops."""
    refit: bool = True
    """Once the epoch is chosen, train again from the start on train and validation side together,
    for so many epochs: what happened last before the cut-off says most about what comes next."""
    monitor: str = "ndcg_at_20"
    """Picks the epoch: recall_at_K, ndcg_at_K or hit_rate_at_K by full ranking of the validation
    side, or auc, by how well the lists shown on it are ordered."""
    validation_queries: int = Field(20_000, ge=1)
    """At most so many validation queries an epoch, a seeded sample."""

    # What each example is told apart from.
    negatives: Literal["drawn", "all"] = "drawn"
    """drawn: other examples' items, uniform draws and the queue; all: every item of the training
    side (full softmax), which needs no correction."""
    uniform_negatives: int = Field(0, ge=0)
    """Candidates drawn uniformly for the whole batch, beside the other examples' items."""
    queue: int = Field(0, ge=0)
    """So many earlier batches' candidates stand beside today's, with the vectors they had
    (cross-batch negatives; Wang et al., 2021)."""
    queue_after: int = Field(500, ge=0)
    """Steps before the queue is used: vectors have to settle first."""
    mined: MiningRules = Field(default_factory=MiningRules)
    """Hard negatives from the top of the current model's own ranking."""
    given: str | None = None
    """File of negatives: columns user, item and perhaps weight (how many items a pair counts as; 1
    where it is not said), in the ids of the log."""
    given_per_query: int = Field(10, ge=1)
    """Of the negatives given for a user, at most so many are drawn for each example."""
    logq: Share = 1.0
    """Correct drawn negatives by their inclusion probability to this power. 1 (or true): the score
    says what is likely. 0 (or false): how much likelier than its popularity an item is. Between
    them popular items are taken down a little, which helps new ones into the lists."""
    counts: Literal["exact", "streaming"] = "exact"
    """How often each item is drawn: counted beforehand, or estimated from the stream as it goes."""
    known: Literal["all", "past", "none"] = "all"
    """Items of the user that are never its negatives: all learned from, or those before."""
    past_weight: float = Field(0.0, ge=0)
    """How many items each of the newest `max_history` items that the user had before counts as, as
    a negative of the example, whatever `known` says. For logs in which nobody has the same twice,
    where seen items may be answered (evaluate.drop_seen = false): each drawn negative stands for
    many items, so that weights far above 1 are needed to be felt. 0: none."""
    skips: Literal["apart", "in_softmax"] = "apart"
    """apart: a softmax of the positive against the skips of its own request, beside the main one.
    in_softmax: skips stand among the drawn negatives; each of those stands for many items, so that
    weights far above 1 are needed for skips to be felt."""
    skip_scale: float = Field(1.0, gt=0)
    """apart: multiplies the logits of the term, so that it may be sharper than the rest."""
    skip_correction: float = Field(0.0, ge=0, le=1)
    """apart: 1 corrects skips for how often they are shown, as drawn negatives are for how often
    they are drawn, so that the term teaches the whole catalogue what is liked; 0 orders shown lists
    best, at the cost of the whole catalogue. The score cannot do both; values between trade."""
    skip_weight: float = Field(0.3, ge=0)
    """apart: weight of the term; in_softmax: how many items a skip counts as; 0: no skips."""

    # What is made small.
    objective: Literal["softmax", "bsl", "psl", "sl_at_k", "triplet", "margin_softmax", "ccl"] = (
        "softmax"
    )
    """softmax (InfoNCE), bilateral softmax, pairwise softmax, softmax at K, triplet, additive
    margin, cosine contrastive: see towers/losses.py."""
    objective_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Of the objective, by the names of its arguments, e.g. {t2 = 1.2} for bsl."""
    symmetric: float = Field(0.0, ge=0, le=1)
    """Share of the same objective from item to user; the rest is from user to item."""
    together: float = Field(0.0, ge=0, le=1)
    """Of several members: share of the objective that is of their mean score, by which they answer;
    the rest each member has by itself."""
    matryoshka: tuple[Annotated[int, Field(ge=2)], ...] = ()
    """Leading dimensions that have to rank well on their own, too, e.g. [16, 32]."""
    temperature: float = Field(0.1, gt=0)
    """Divides the score; where learning starts when it is learned."""
    learn_temperature: bool = False

    # How it is made small.
    start: Literal["random", "spectral", "company"] = "random"
    """Id tables at first: small noise; the leading singular vectors of who had what (for sets); or
    those of which items stand near each other in histories (for sequences)."""
    start_window: int = Field(0, ge=0)
    """spectral: what was had within so many consecutive events goes together, where their order
    means something; 0: all that a user had."""
    start_powers: tuple[Power, Power, Power] = (0.5, 0.5, 0.0)
    """spectral: [a, b, c]. An event weighs (events of its user)^-a · (events of its item)^-b in the
    decomposition, and a direction (its singular value)^c in the score. [.5, .5, 0] is the usual
    low-pass filter; a smaller a lets those who did more say more, a larger c trusts the leading
    directions more."""
    start_code: int = Field(0, ge=0)
    """company: so many dimensions of an id vector start as a random code instead, by which what the
    user had can be told from what is like it. With towers.look_back, which then starts by answering
    against these codes, what was had is ranked low from the first step on, and learning says how
    low. For logs in which hardly anything is had twice."""
    learning_rate: float = Field(2e-3, gt=0)
    """Of the dense layers."""
    table_learning_rate: float | None = Field(None, gt=0)
    """Of id tables; None: the same."""
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
    warmup_steps: int = Field(100, ge=0)
    """Steps over which the learning rate rises from zero."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest common norm of all gradients of a step."""
    tile: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    """Rows of the score matrix at once; the rest of it is made again in the backward pass. auto:
    all of them, as long as the matrix takes less than a GiB."""
    accelerator: str = "auto"
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
        _check_options(self.objective, self.objective_options)
        if self.epochs == 0 and self.start == "random":
            raise ValueError(
                'with epochs = 0 the towers stay as they start, and start = "random" is noise: set '
                'start to "spectral" or "company", or epochs to at least 1.'
            )
        if self.start_code and self.start != "company":
            raise ValueError(
                f'start_code is of start = "company", and start is "{self.start}": leave it at 0.'
            )
        if self.negatives == "all" and (self.uniform_negatives or self.queue):
            raise ValueError(
                'with negatives = "all" every item is a candidate already: leave '
                "uniform_negatives and queue at 0."
            )
        return self


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    objective = OBJECTIVES[name]
    hints = get_type_hints(objective)
    known = {
        p.name: hints[p.name]
        for p in inspect.signature(objective).parameters.values()
        # What is a tensor is of a batch, and no option.
        if p.kind is inspect.Parameter.KEYWORD_ONLY and Tensor not in get_args(hints[p.name])
    }
    for option, value in options.items():
        if option not in known:
            raise ValueError(
                f"the objective {name!r} has no option {option!r}; it takes "
                f"{', '.join(known) or 'none'}."
            )
        try:
            TypeAdapter(known[option]).validate_python(value, strict=True)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Input s")
            raise ValueError(
                f"the option {option!r} of the objective {name!r} is {value!r}, but it s{said}."
            ) from None


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

from __future__ import annotations

"""Jagged candidate sets, and softmax attention from the candidates of a request to that request's own keys.

    request 0: c c c        sets of like size are computed together as [b, T] (T at most twice the smallest set),
    request 1: c c c        so that a set of 4,000 beside many of 20 costs no padding to 4,000
    request 2: c

No parameter lives here: under DeepSpeed ZeRO-3 every module with parameters runs once, while the loop over size groups
runs as often as the local sets need. The letters are those of models/interface.py; S counts keys, b the requests of a
group.
"""



import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED_SCORE = -1e30
"""Score of a key that does not exist: finite, so that a row without any key gives equal weights and not NaN."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateSets:
    """Where the candidates of every request stand, grouped by the size of their set."""

    num_requests: int
    """B."""
    uniform_size: int | None
    """T if every set has T candidates: then [M] is [B, T] without moving anything and there are no groups."""
    group_request: tuple[Tensor, ...]
    """Per group [b] int64: its requests."""
    group_row: tuple[Tensor, ...]
    """Per group [b, T] int64: rows of M; padding repeats the set's first row."""
    group_present: tuple[Tensor, ...]
    """Per group [b, T] bool: not padding."""
    place_M: Tensor
    """[M] int64: where each candidate stands in the groups laid end to end; empty if there are none."""
    request_M: Tensor
    """[M] int64: the request of each candidate."""

    @staticmethod
    def from_offsets(candidate_offsets_B1: Tensor, *, device: torch.device) -> CandidateSets:
        """The layout of the sets that `candidate_offsets_B1` [B + 1], on the host, delimits; indices on `device`."""
        size_B = candidate_offsets_B1.diff()
        num_requests = size_B.numel()
        smallest, largest = (int(size_B.min()), int(size_B.max())) if num_requests else (0, 0)
        uniform = smallest if smallest == largest else None
        groups: list[tuple[Tensor, Tensor, Tensor]] = []
        if uniform is None:
            class_B = torch.ceil(torch.log2(size_B.double().clamp_min(1))).long()
            for size_class in torch.unique(class_B[size_B > 0]).tolist():
                request_b = torch.nonzero((class_B == size_class) & (size_B > 0)).squeeze(1)
                place_T = torch.arange(int(size_B[request_b].max()), device=size_B.device)
                present_bT = place_T < size_B[request_b, None]
                row_bT = candidate_offsets_B1[request_b, None] + torch.where(present_bT, place_T, 0)
                groups.append((request_b, row_bT, present_bT))
        requests, rows, presents = zip(*groups, strict=True) if groups else ((), (), ())
        # The place that each candidate got in the groups laid end to end, padding included.
        present = torch.cat([group.flatten() for group in presents]) if groups else torch.zeros(0, dtype=torch.bool)
        row = torch.cat([group.flatten() for group in rows]) if groups else torch.zeros(0, dtype=torch.long)
        place = torch.nonzero(present).squeeze(1)

        def move(index: Tensor) -> Tensor:
            return index.to(device, non_blocking=True)

        return CandidateSets(
            num_requests=num_requests,
            uniform_size=uniform,
            group_request=tuple(map(move, requests)),
            group_row=tuple(map(move, rows)),
            group_present=tuple(map(move, presents)),
            place_M=move(place[torch.argsort(row[place])]),
            request_M=move(torch.repeat_interleave(size_B)),
        )

    def map(self, compute: Callable[..., Tensor], value_MD: Tensor, *per_request: Tensor) -> Tensor:
        """result_MD of `compute(value_bTD, present_bT or None, *per_request[b])`, which returns [b, T, D] per group."""
        if self.uniform_size is not None:
            dense = value_MD.view(self.num_requests, self.uniform_size, value_MD.shape[1])
            return compute(dense, None, *per_request).flatten(0, 1)
        results = []
        for request_b, row_bT, present_bT in zip(self.group_request, self.group_row, self.group_present, strict=True):
            chosen = (gather_rows(tensor, request_b) for tensor in per_request)
            results.append(compute(gather_rows(value_MD, row_bT), present_bT, *chosen).flatten(0, 1))
        return gather_rows(torch.cat(results), self.place_M)


def attend(
    query_MD: Tensor,
    *,
    key_BSD: Tensor,
    value_BSD: Tensor,
    bias_BHS: Tensor,
    num_heads: int,
    candidates: CandidateSets,
    softmax: bool = True,
) -> Tensor:
    """out_MD = softmax_S(Q_h K_h^T + bias) V_h, heads side by side; keys are already scaled.

    Keys that do not exist have bias MASKED_SCORE and value 0; a request without any key gets 0. Without softmax such
    keys must be 0 as well, and there is no bias.
    """

    def compute(query_bTD: Tensor, _: Tensor | None, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attend_dense(
            query_bTD, key_bSD=key, value_bSD=value, bias_bHS=bias, num_heads=num_heads, softmax=softmax
        )

    return candidates.map(compute, query_MD, key_BSD, value_BSD, bias_BHS)


def attend_dense(
    query_bTD: Tensor,
    *,
    key_bSD: Tensor,
    value_bSD: Tensor,
    bias_bHS: Tensor,
    num_heads: int,
    softmax: bool = True,
) -> Tensor:
    """out_bTD: `attend` for requests with equally many candidates."""
    b, size, width = query_bTD.shape

    def heads(value: Tensor) -> Tensor:
        return value.reshape(b, value.shape[1], num_heads, width // num_heads).transpose(1, 2).flatten(0, 1)

    if softmax:
        bias = bias_bHS.expand(b, num_heads, bias_bHS.shape[2]).reshape(b * num_heads, 1, bias_bHS.shape[2])
        weight = torch.softmax(torch.baddbmm(bias, heads(query_bTD), heads(key_bSD).transpose(1, 2)), -1)
    else:
        weight = torch.bmm(heads(query_bTD), heads(key_bSD).transpose(1, 2))
    mixed = torch.bmm(weight, heads(value_bSD))
    return mixed.unflatten(0, (b, num_heads)).transpose(1, 2).reshape(b, size, width)


def start_as_similarity(*linears: nn.Linear) -> None:
    """Identity maps for query, key, value and output: before any training a candidate attends to events like itself,
    and its score is how like them it is."""
    for linear in linears:
        for part in linear.weight.data.split(linear.in_features):
            nn.init.eye_(part)


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for a table of any shape behind its first axis; the gradient of bfloat16 rows is summed in float32.

    An embedding look-up: its backward on a CPU is 2.5x faster than that of index_select (104,000 rows of 64 floats:
    10 ms against 26 ms, one core).
    """
    wide = table.flatten(1).float() if table.dtype == torch.bfloat16 else table.flatten(1)
    return F.embedding(index, wide).to(table.dtype).view(*index.shape, *table.shape[1:])


def mask_bias(valid: Tensor, *, dtype: torch.dtype) -> Tensor:
    """0 where valid, MASKED_SCORE elsewhere, in the shape of `valid`."""
    return torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill(~valid, MASKED_SCORE)

"""What a recommender is: the tensors it reads, the scores it returns, the letters of every shape.

    U users of the batch           N history events of all users (jagged)    B requests of all users
    M candidates of all requests   I distinct items of the batch             C width of an embedding table
    D model width                  H heads                                   R rank: interests of a history
    W recent events seen exactly   K checkpoints of a history                F item features, G user features
    T requests or events of one user, where a tensor is dense over them

A tensor's name ends with its shape: `query_MHD` is [M, H, D]; `1` means "plus one" (`event_offsets_U1` is [U + 1]).
Tables (models/embeddings.py) turn ids into rows; a tower (solar.py and its competitors) turns rows into scores and
imports torch alone, so that it runs where TorchRec does not.
"""



import dataclasses

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInput:
    """What a tower reads. Items are looked up once each; events and candidates point into them by index.

    What says where things are (event_offsets, request_user, request_position, candidate_offsets) is on the host, all
    else on the device: a tower plans on the host and never waits for the device to tell it a size.
    """

    item_IC: Tensor
    """[I, C] embedding rows of the distinct items of this batch, with the gradient of the look-up."""
    features_IFC: Tensor
    """[I, F, C] one vector per item feature: the mean of its values' rows, zero where an item has none, and in the
    last columns where the feature's table is narrower than C."""
    user_features_UGC: Tensor
    """[U, G, C] one vector per user feature, as features_IFC has it of items; G may be 0."""
    event_offsets_U1: Tensor
    """[U + 1] int64, host: user u owns events event_offsets[u] : event_offsets[u + 1], in total order."""
    event_item_N: Tensor
    """[N] int64 index into I."""
    event_time_N: Tensor
    """[N] int64 milliseconds since 1970 UTC, zero where the log has an order only."""
    event_action_N: Tensor
    """[N] int64 action code, below `num_actions` of the model's config; 0 = none."""
    request_user_B: Tensor
    """[B] int64, host, not decreasing."""
    request_position_B: Tensor
    """[B] int64, host: the first so many events of the user are the history."""
    request_time_B: Tensor
    """[B] int64 milliseconds since 1970 UTC, zero where the log has an order only."""
    candidate_offsets_B1: Tensor
    """[B + 1] int64, host."""
    candidate_item_M: Tensor
    """[M] int64 index into I."""
    num_reserved: int = 0
    """The first so many of I are no items of their own: padding, and the one that stands for all unknown items."""

    def refuse_bad_layout(self) -> ModelInput:
        """This input; ValueError with the value, the rule and the fix where a tower could only return nonsense.

        Looks at values on the host alone: on an accelerator nothing waits, and times are taken as they are. Rows have
        their own check, `refuse_bad_rows`, once a look-up: a catalogue serves many inputs.
        """
        num_users, num_events = self.event_offsets_U1.numel() - 1, self.event_item_N.numel()
        length_U = self.event_offsets_U1.diff()
        _refuse(
            bool((length_U < 0).any()) or int(self.event_offsets_U1[-1]) != num_events,
            f"event_offsets end at {int(self.event_offsets_U1[-1])} of {num_events} events: let them rise to it",
        )
        size_B, user_B = self.candidate_offsets_B1.diff(), self.request_user_B
        _refuse(
            bool((size_B < 0).any()) or int(self.candidate_offsets_B1[-1]) != self.candidate_item_M.numel(),
            f"candidate_offsets end at {int(self.candidate_offsets_B1[-1])} of {self.candidate_item_M.numel()} "
            "candidates: let them rise to it",
        )
        if user_B.numel():
            _refuse(
                bool((user_B.diff() < 0).any()) or not 0 <= int(user_B[0]) <= int(user_B[-1]) < num_users,
                f"request_user runs from {int(user_B[0])} to {int(user_B[-1])}: it must rise within {num_users} users",
            )
            beyond_B = (self.request_position_B < 0) | (self.request_position_B > length_U[user_B])
            _refuse(
                bool(beyond_B.any()),
                f"request_position {self.request_position_B[beyond_B][:1].tolist()} lies outside its user's events: "
                "a history is a number of the user's first events",
            )
        if self.event_time_N.device.type == "cpu":
            self._refuse_bad_times()
        return self

    def _refuse_bad_times(self) -> None:
        falls_N = torch.diff(self.event_time_N, prepend=self.event_time_N[:1]) < 0
        starts = self.event_offsets_U1[:-1]
        falls_N[starts[starts < falls_N.numel()]] = False
        _refuse(
            bool(falls_N.any()),
            f"event {torch.nonzero(falls_N)[:1].flatten().tolist()} is earlier than the one before it: sort a user's "
            "events by time",
        )
        seen_B = self.request_position_B > 0
        last_B = (self.event_offsets_U1[self.request_user_B] + self.request_position_B - 1)[seen_B]
        early_B = self.request_time_B[seen_B] < self.event_time_N[last_B]
        _refuse(
            bool(early_B.any()),
            f"request {torch.nonzero(seen_B).flatten()[early_B][:1].tolist()} is earlier than the last event of its "
            "history: give it its own time",
        )


def refuse_bad_rows(item_IC: Tensor, features_IFC: Tensor) -> None:
    """ValueError for looked-up rows of two types or, on the host, that are not finite."""
    _refuse(
        item_IC.dtype != features_IFC.dtype or not item_IC.is_floating_point(),
        f"item rows are {item_IC.dtype}, feature rows {features_IFC.dtype}: look both up in one type",
    )
    if item_IC.device.type != "cpu":
        return
    for name, rows in (("item", item_IC), ("feature", features_IFC)):
        finite_I = torch.isfinite(rows.detach()).flatten(1).all(1)
        _refuse(
            not bool(finite_I.all()),
            f"{name} row {torch.nonzero(~finite_I)[:1].flatten().tolist()} of the batch is not finite: training "
            "diverged; go back to an earlier checkpoint and lower the learning rate",
        )


def refuse_feature_width(feature_width: int | dict[str, int] | None, *, width: int) -> None:
    """ValueError for a width above `width`, or for one that fbgemm has no tables of."""
    of_feature = feature_width if isinstance(feature_width, dict) else {"": feature_width}
    for name, value in of_feature.items():
        if value is not None and (not 4 <= value <= width or value % 4):
            where = f" of {name}" if name else ""
            raise ValueError(
                f"feature_width = {feature_width}: the width{where} must be a multiple of 4, from 4 to width = {width}"
            )


def _refuse(mistake: bool, line: str) -> None:
    if mistake:
        raise ValueError(line)


class Recommender(nn.Module):
    """A tower. U, N, B, I or M may be 0: it then runs on empty tensors and returns an empty result with a gradient."""

    def forward(self, inputs: ModelInput) -> Tensor:
        """logits_M: one calibrated logit per candidate, float32 (sigmoid = probability of a positive label)."""
        raise NotImplementedError

"""What a history is to a tower: its events as vectors, and which of them are recent to a request.

    item vector + action + hour of day + weekday + gap to the previous event + time  --normalise-->  event_ND

All of it is known when the event happens, whoever asks later: it may enter before the decomposition, which serves every
request. What depends on the request (how long ago, how many events ago) belongs to the exact recent window alone.
The letters are those of models/interface.py.
"""



import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn



MS_PER_HOUR = 3_600_000
NUM_GAP_BUCKETS = 32
"""Buckets of a time gap: floor(log2(1 + seconds)); the last begins at 68 years."""
WAVE_DAYS = tuple(2.0**k for k in range(-2, 14))
"""Periods of the waves that tell absolute time: six hours to 22 years."""


class ItemEncoder(nn.Module):
    """item_ID = LayerNorm(W [item row, mean vector of each item feature]): item side features enter here."""

    def __init__(self, width: int, *, num_features: int) -> None:
        super().__init__()
        self.project = nn.Linear(width * (1 + num_features), width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, item_IC: Tensor, features_IFC: Tensor) -> Tensor:
        rows = torch.cat([item_IC[:, None], features_IFC], 1).flatten(1)
        return self.norm(self.project(rows.to(self.project.weight.dtype)))


class EventEncoder(nn.Module):
    """event_ND: the item's vector, plus what the log says about the event itself."""

    def __init__(
        self, width: int, *, num_actions: int, time_features: bool, absolute_time: bool, dropout: float
    ) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.action = nn.Embedding(num_actions, width) if num_actions > 1 else None
        self.hour = nn.Embedding(24, width) if time_features else None
        self.weekday = nn.Embedding(7, width) if time_features else None
        self.gap = nn.Embedding(NUM_GAP_BUCKETS, width) if time_features else None
        self.waves = nn.Linear(2 * len(WAVE_DAYS), width, bias=False) if absolute_time else None
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        for embedding in (self.action, self.hour, self.weekday, self.gap):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, item_ID: Tensor, inputs: ModelInput) -> Tensor:
        event_ND = F.embedding(inputs.event_item_N, item_ID)
        if self.action is not None:
            event_ND = event_ND + self.action(inputs.event_action_N)
        if self.hour is not None and self.weekday is not None and self.gap is not None:
            hours_N = torch.div(inputs.event_time_N, MS_PER_HOUR, rounding_mode="floor")
            days_N = torch.div(hours_N, 24, rounding_mode="floor")
            event_ND = event_ND + self.hour(hours_N % 24) + self.weekday(days_N % 7)
            event_ND = event_ND + self.gap(previous_gap(inputs.event_time_N, inputs.event_offsets_U1))
        if self.waves is not None:
            event_ND = event_ND + self.waves(time_waves(inputs.event_time_N).to(event_ND.dtype))
        return self.dropout(self.norm(event_ND))


def time_waves(time_N: Tensor) -> Tensor:
    """[N, 2 waves] float32: sine and cosine of absolute time at every period of WAVE_DAYS.

    A bilinear form of the waves of two times can be any smooth function of their difference. With them in the events
    before the decomposition, and in the query, attention to interests can weigh by age, though a Gram is a set.
    """
    days_W = torch.tensor(WAVE_DAYS, dtype=torch.float64, device=time_N.device)
    turns_NW = time_N[:, None].double() / (24 * MS_PER_HOUR) / days_W
    # Whole turns go in float64: of twenty thousand days float32 keeps minutes.
    phase_NW = ((turns_NW - turns_NW.floor()) * (2 * math.pi)).float()
    return torch.cat([phase_NW.sin(), phase_NW.cos()], 1)


def previous_gap(event_time_N: Tensor, event_offsets_U1: Tensor) -> Tensor:
    """[N] bucket of the time since the user's previous event; bucket 0 for the first."""
    gap_N = torch.diff(event_time_N, prepend=event_time_N[:1])
    starts = event_offsets_U1[:-1][event_offsets_U1.diff() > 0]
    return gap_bucket(gap_N.index_fill(0, starts.to(gap_N.device, non_blocking=True), 0))


def recent_events(inputs: ModelInput, *, window: int) -> tuple[Tensor, Tensor]:
    """The latest `window` events before each request, oldest first: (event_BW, gap_BW).

    event_BW: [B, W] 1 + index into N, 0 where there is none. gap_BW: [B, W] bucket of the time from event to request.
    """
    place_BW = inputs.request_position_B[:, None] + torch.arange(-window, 0)
    event_BW = inputs.event_offsets_U1[inputs.request_user_B][:, None] + place_BW + 1
    event_BW = torch.where(place_BW >= 0, event_BW, 0).to(inputs.event_time_N.device, non_blocking=True)
    time_N1 = torch.cat([inputs.event_time_N.new_zeros(1), inputs.event_time_N])
    return event_BW, gap_bucket(inputs.request_time_B[:, None] - time_N1[event_BW])


def gap_bucket(gap_ms: Tensor) -> Tensor:
    """floor(log2(1 + seconds)), at least 0, at most NUM_GAP_BUCKETS - 1."""
    seconds = gap_ms.clamp_min(0).double() / 1000
    return torch.log2(seconds + 1).long().clamp_max(NUM_GAP_BUCKETS - 1)

"""What a history says of a candidate exactly, however long it is: how often and how lately the candidate itself occurs.

    repeat_M = MLP(log(1 + count in the latest w events) for each w, log(1 + events since), log(1 + hours since))
    repeat_M = b where the candidate occurs in the history, else 0             (what all items can be given at once)

A vector of a history, be it a mean or R interests, tells what its items are like, not which of thousands they were.
Where people come back to items that is the strongest signal there is (personal frequency of next-basket recommendation,
arXiv 2109.14233), and no item needs training for it. One sort of the batch's events and some binary searches a
candidate: O((N + M) log N), nothing of size N x M.
The letters are those of models/interface.py; X counts the arguments of the MLP.
"""



import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn





WINDOWS = (16, 128, 1024)
"""Latest events in which a candidate is counted, beside all that are read."""
HIDDEN = 16
NEVER = torch.iinfo(torch.int32).max
"""Beyond every position of a sequence."""


class RepeatScore(nn.Module):
    """One number per candidate, a part of its logit; the same for all that do not occur in their history."""

    def __init__(self, *, time_features: bool, latest: int | None = None) -> None:
        """latest: events of a history that are read; None = all."""
        super().__init__()
        self.time_features = time_features
        self.windows = (*(window for window in WINDOWS if latest is None or window < latest), latest)
        self.hidden = nn.Linear(len(self.windows) + 1 + time_features, HIDDEN)
        self.last = nn.Linear(HIDDEN, 1, bias=False)
        # A start without it: the model learns it where people come back.
        nn.init.zeros_(self.last.weight)

    def forward(self, inputs: ModelInput, *, candidates: CandidateSets) -> Tensor:
        found_MX = repeats(
            inputs, request_M=candidates.request_M, windows=self.windows, time_features=self.time_features
        )
        return self.last(torch.relu(self.hidden(found_MX.to(self.hidden.weight.dtype)))).squeeze(-1)


class RepeatBias(nn.Module):
    """b, one number: far below 0 where nobody comes back to an item, above it where people do."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_1 = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        # Not the parameter itself: spread over ranks, it is whole in here alone.
        return self.bias_1.float() + 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeenItems:
    """Which of all items the histories of requests hold: U x I numbers, for models that score all items at once."""

    first_UI: Tensor
    """int32: where in its user's events an item stands first, from 0; NEVER where it does not."""
    user_B: Tensor
    """[B] int64."""
    position_B: Tensor
    """[B] int64: the first so many events of the user are the history."""

    @staticmethod
    def of_requests(inputs: ModelInput, *, first_item: int = 0) -> SeenItems:
        """Of all requests; items below `first_item` are left out."""
        device = inputs.event_item_N.device
        first_UI = first_places(inputs.event_item_N, inputs.event_offsets_U1, num_items=inputs.item_IC.shape[0])
        return SeenItems(
            first_UI=first_UI[:, first_item:],
            user_B=inputs.request_user_B.to(device, non_blocking=True),
            position_B=inputs.request_position_B.to(device, non_blocking=True),
        )

    def before(self, request_P: Tensor | slice) -> Tensor:
        """[P, I] bool: whether each item stands in the history of each of these requests."""
        return self.first_UI[self.user_B[request_P]] < self.position_B[request_P, None]


def first_places(event_item_N: Tensor, event_offsets_U1: Tensor, *, num_items: int) -> Tensor:
    """first_UI of `SeenItems`; the offsets are on the host."""
    device, num_users = event_item_N.device, event_offsets_U1.numel() - 1
    owner_N = torch.repeat_interleave(event_offsets_U1.diff())
    place_N = torch.arange(len(owner_N)) - event_offsets_U1[:-1][owner_N]
    place_N, row_N = place_N.int().to(device, non_blocking=True), (owner_N * num_items).to(device, non_blocking=True)
    never = torch.full((num_users * num_items,), NEVER, dtype=torch.int32, device=device)
    return never.scatter_reduce_(0, row_N + event_item_N, place_N, "amin").view(num_users, num_items)


def repeats(inputs: ModelInput, *, request_M: Tensor, windows: Sequence[int | None], time_features: bool) -> Tensor:
    """[M, X] float32: the arguments above, 0 for a candidate that does not occur in the last window or is no known
    item. windows: ascending; None, at the end, = all events."""
    item_M, device = inputs.candidate_item_M, inputs.candidate_item_M.device
    num_events = inputs.event_item_N.shape[0]
    start_B = inputs.event_offsets_U1[inputs.request_user_B]
    start_M, length_M = (
        value_B.to(device, non_blocking=True)[request_M] for value_B in (start_B, inputs.request_position_B)
    )
    # An item's events stand together and in order, and a user's are one range of rows: counting is subtraction.
    stride = num_events + 1
    key_N = torch.sort(inputs.event_item_N * stride + torch.arange(num_events, device=device)).values
    first_M = item_M * stride + start_M
    end_M = torch.searchsorted(key_N, first_M + length_M)
    known_M = item_M >= inputs.num_reserved
    counts = []
    for window in windows:
        older_M = 0 if window is None else (length_M - window).clamp_min(0)
        counts.append((end_M - torch.searchsorted(key_N, first_M + older_M)) * known_M)
    seen_M = counts[-1] > 0
    last_M = torch.where(seen_M, torch.cat([key_N.new_zeros(1), key_N])[end_M] - item_M * stride, 0)
    found = [*counts, torch.where(seen_M, start_M + length_M - 1 - last_M, 0)]
    if time_features:
        time_N1 = torch.cat([inputs.event_time_N, inputs.event_time_N.new_zeros(1)])
        since_M = (inputs.request_time_B[request_M] - time_N1[last_M]).clamp_min(0)
        found.append(torch.where(seen_M, since_M, 0) / MS_PER_HOUR)
    return torch.log1p(torch.stack([value_M.float() for value_M in found], 1))

"""What is known of a request beside its history: features of its user, and when it is made.

    request_BD = LayerNorm(W [mean vector of each user feature] + hour of day + weekday + W [time])

It shifts the query and the state of every candidate of the request. A score that is the same for all candidates would
rank nothing: it is the candidate's own interests and item that the shifted vectors meet.
The letters are those of models/interface.py.
"""



import torch
from torch import Tensor, nn






class RequestEncoder(nn.Module):
    """request_BD of every request. A request without a time (0) has neither hour nor weekday, a user without values no
    features: what is unknown enters the sum as zero."""

    def __init__(self, width: int, *, num_user_features: int, context: bool, absolute_time: bool) -> None:
        super().__init__()
        self.width = width
        self.user = nn.Linear(width * num_user_features, width, bias=False) if num_user_features else None
        self.hour = nn.Embedding(24, width) if context else None
        self.weekday = nn.Embedding(7, width) if context else None
        self.waves = nn.Linear(2 * len(WAVE_DAYS), width, bias=False) if absolute_time else None
        self.norm = nn.LayerNorm(width)
        for embedding in (self.hour, self.weekday):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, inputs: ModelInput) -> Tensor:
        time_B, dtype = inputs.request_time_B, self.norm.weight.dtype
        request_BD = torch.zeros(time_B.shape[0], self.width, dtype=dtype, device=time_B.device)
        if self.user is not None:
            user_UD = self.user(inputs.user_features_UGC.flatten(1).to(dtype))
            user_B = inputs.request_user_B.to(user_UD.device, non_blocking=True)
            request_BD = request_BD + gather_rows(user_UD, user_B)
        timed_B1 = (time_B != 0)[:, None]
        if self.hour is not None and self.weekday is not None:
            hours_B = torch.div(time_B, MS_PER_HOUR, rounding_mode="floor")
            days_B = torch.div(hours_B, 24, rounding_mode="floor")
            request_BD = request_BD + (self.hour(hours_B % 24) + self.weekday(days_B % 7)) * timed_B1
        if self.waves is not None:
            request_BD = request_BD + self.waves(time_waves(time_B).to(dtype)) * timed_B1
        return self.norm(request_BD)


class RequestShift(nn.Module):
    """(query_MD, state_MD): what a request adds to the first query and to the final state of each of its candidates."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.state = nn.Linear(width, width, bias=False)
        # A start without the shift: the model learns it where it helps.
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.state.weight)

    def forward(self, request_BD: Tensor, *, request_M: Tensor) -> tuple[Tensor, Tensor]:
        return gather_rows(self.query(request_BD), request_M), gather_rows(self.state(request_BD), request_M)

"""What SOLAR and its competitors share, so that only the reading of the long history differs between them.

    item_ID = items(item rows, item features)          event_ND = events(items of the history, action, time)
    C += W_O [whole history read by Q = W_Q norm(C) + the request  +  RecentAttention(Q, latest W events)]
    logit = head(C + the request, item)  [+ repeats(item, history)]

A competitor is a subclass that says how the whole history is read: one file each, the same encoders, recent window,
head and sizes. Solar repeats the middle line in blocks.
The letters are those of models/interface.py.
"""



import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn








@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """What every attention tower has. Every part can be switched off."""

    width: int = 64
    """D, of the model and of the embedding tables."""
    feature_width: int | dict[str, int] | None = None
    """Width of the tables of item and user features, a multiple of 4 up to `width`: one for all, or {feature: width}
    with `width` for the others; null = `width`. A row is read as if zeros followed it."""
    num_heads: int = 2
    """Heads of every attention; divides `width`."""
    recent_window: int = 50
    """W, latest events that are attended to exactly; 0 switches this off."""
    head_width: int = 32
    """Hidden units of the head's network; 0 leaves the inner product alone."""
    initial_agreement: float = 1.0
    """Weight, before training, of how like a candidate is to what it found. 1 suits next_item, where similar is likely
    next. Where candidates were shown, similar is not liked: 0.125 (MovieLens-100K, impressions, 3 seeds: validation
    LogLoss .636 +- .006 instead of .678 +- .007, GAUC .676 +- .002 instead of .660 +- .017)."""
    dropout: float = 0.1
    """Probability that a unit of an event vector is zeroed in training."""
    num_actions: int = 1
    """Action codes are below this; 1 = the log has no actions."""
    time_features: bool = True
    """Hour of day, weekday and gap to the previous event are part of an event; the gap to the request of recency."""
    user_features: bool = True
    """Features of the user who asks shift the query and the state of every candidate (the measurement below with them:
    AUC .7067, LogLoss .6316)."""
    num_user_features: int = 0
    """G, user features of the data; 0 = none."""
    context_features: bool = False
    """Hour of day and weekday of the request do the same, where time_features is on. Off: no better nor worse on
    MovieLens-100K (impressions, 3 epochs, 3 seeds: validation AUC .6994 against .6987, LogLoss .6351 against .6357)."""
    repeats: bool = False
    """How often and how lately the candidate itself occurs in the history is a part of its score: for data where
    people come back to items."""
    absolute_time: bool = False
    """Waves of absolute time are part of an event and of a request, where time_features is on: attention to the whole
    history can then weigh by age, and a candidate's score can follow the season."""

    @property
    def reads_context(self) -> bool:
        """Whether hour and weekday of the request are read."""
        return self.context_features and self.time_features

    @property
    def reads_waves(self) -> bool:
        """Whether absolute time is read."""
        return self.absolute_time and self.time_features

    @property
    def reads_request(self) -> bool:
        """Whether anything but the history tells requests apart."""
        return bool(self.user_features and self.num_user_features) or self.reads_context or self.reads_waves

    @property
    def latest(self) -> int | None:
        """Latest events of a history that the tower reads; None = all of them."""
        return None

    def __post_init__(self) -> None:
        for name in ("width", "num_heads", "num_actions"):
            self._refuse_below(name, 1)
        refuse_feature_width(self.feature_width, width=self.width)
        for name in ("recent_window", "head_width", "num_user_features"):
            self._refuse_below(name, 0)
        if self.width % self.num_heads:
            raise ValueError(f"width = {self.width} must be a multiple of num_heads = {self.num_heads}; change one")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} must be at least 0 and below 1")
        if not 0 <= self.initial_agreement < math.inf:
            raise ValueError(f"initial_agreement = {self.initial_agreement} must be a number of at least 0")

    def _refuse_below(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            rule = "must not be negative; 0 switches it off" if least == 0 else f"must be at least {least}"
            raise ValueError(f"{name} = {getattr(self, name)} {rule}")


class HistoryTower(Recommender):
    """Encoders, head and what is known of a request. `num_features` is F, the item features of the tables."""

    def __init__(self, config: TowerConfig, *, num_features: int) -> None:
        super().__init__()
        self.items = ItemEncoder(config.width, num_features=num_features)
        self.events = EventEncoder(
            config.width,
            num_actions=config.num_actions,
            time_features=config.time_features,
            absolute_time=config.reads_waves,
            dropout=config.dropout,
        )
        self.head = Head(config.width, hidden=config.head_width, initial_agreement=config.initial_agreement)
        self.request = request_encoder(config)
        self.shift = RequestShift(config.width) if config.reads_request else None
        self.repeats = RepeatScore(time_features=config.time_features, latest=config.latest) if config.repeats else None

    def states(
        self,
        item_ID: Tensor,
        *,
        event_ND: Tensor,
        query_shift_MD: Tensor | None,
        inputs: ModelInput,
        candidates: CandidateSets,
    ) -> Tensor:
        """state_MD: every candidate after it has read its request's history."""
        raise NotImplementedError

    def forward(self, inputs: ModelInput) -> Tensor:
        candidates = CandidateSets.from_offsets(inputs.candidate_offsets_B1, device=inputs.candidate_item_M.device)
        item_ID = self.items(inputs.item_IC, inputs.features_IFC)
        query_shift_MD = state_shift_MD = None
        if self.request is not None and self.shift is not None:
            query_shift_MD, state_shift_MD = self.shift(self.request(inputs), request_M=candidates.request_M)
        state_MD = self.states(
            item_ID,
            event_ND=self.events(item_ID, inputs),
            query_shift_MD=query_shift_MD,
            inputs=inputs,
            candidates=candidates,
        )
        if state_shift_MD is not None:
            state_MD = state_MD + state_shift_MD
        logit_M = self.head(state_MD, item_ID=item_ID, item_M=inputs.candidate_item_M)
        if self.repeats is not None:
            logit_M = logit_M + self.repeats(inputs, candidates=candidates)
        return logit_M.float()


class AttentionTower(HistoryTower):
    """A tower whose candidates read the history once."""

    def __init__(self, config: TowerConfig, *, num_features: int) -> None:
        super().__init__(config, num_features=num_features)
        self.norm = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.recent = RecentAttention(config) if config.recent_window else None
        self.output = nn.Linear(config.width, config.width, bias=False)
        start_as_similarity(self.query, self.output)

    def read_history(
        self, query_MD: Tensor, *, event_ND: Tensor, inputs: ModelInput, candidates: CandidateSets
    ) -> Tensor | None:
        """out_MD: what each candidate finds in the whole history of its request; None = this is left to the window."""
        raise NotImplementedError

    def states(
        self,
        item_ID: Tensor,
        *,
        event_ND: Tensor,
        query_shift_MD: Tensor | None,
        inputs: ModelInput,
        candidates: CandidateSets,
    ) -> Tensor:
        item_M = inputs.candidate_item_M
        query_MD = gather_rows(self.query(self.norm(item_ID)), item_M)
        if query_shift_MD is not None:
            query_MD = query_MD + query_shift_MD
        found_MD = self.read_history(query_MD, event_ND=event_ND, inputs=inputs, candidates=candidates)
        if self.recent is not None:
            recent_MD = self.recent(query_MD, event_ND=event_ND, inputs=inputs, candidates=candidates)
            found_MD = recent_MD if found_MD is None else found_MD + recent_MD
        assert found_MD is not None, "a config leaves the whole history or the window"
        return gather_rows(item_ID, item_M) + self.output(found_MD)


def request_encoder(config: TowerConfig) -> RequestEncoder | None:
    """None where nothing but the history tells requests apart."""
    if not config.reads_request:
        return None
    return RequestEncoder(
        config.width,
        num_user_features=config.num_user_features if config.user_features else 0,
        context=config.reads_context,
        absolute_time=config.reads_waves,
    )


class RecentAttention(nn.Module):
    """Candidates attend to the latest W events themselves; recency enters as a score per head: how many events ago, and
    how long ago (buckets of the gap to the request)."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.num_heads, self.window = config.num_heads, config.recent_window
        self.key = nn.Linear(config.width, config.width, bias=False)
        self.value = nn.Linear(config.width, config.width, bias=False)
        start_as_similarity(self.key, self.value)
        self.position_WH = nn.Parameter(torch.zeros(config.recent_window, config.num_heads))
        self.gap_GH = nn.Parameter(torch.zeros(NUM_GAP_BUCKETS, config.num_heads)) if config.time_features else None

    def forward(self, query_MD: Tensor, *, event_ND: Tensor, inputs: ModelInput, candidates: CandidateSets) -> Tensor:
        head_width = query_MD.shape[1] // self.num_heads
        event_BW, gap_BW = recent_events(inputs, window=self.window)
        if event_BW.numel() < event_ND.shape[0]:
            # Long histories, few requests: only what some request sees is projected.
            seen_BWD = gather_rows(event_ND, (event_BW - 1).clamp_min(0))
            key_BWD = self.key(seen_BWD)
            value_BWD = self.value(seen_BWD).masked_fill((event_BW == 0)[:, :, None], 0.0)
        else:
            # Projected once per event, not per request that sees it. Row 0, the event that does not exist, is 0.
            key_BWD, value_BWD = (
                gather_rows(F.pad(project(event_ND), (0, 0, 1, 0)), event_BW) for project in (self.key, self.value)
            )
        bias_BWH = self.position_WH.expand(event_BW.shape[0], -1, -1)
        if self.gap_GH is not None:
            bias_BWH = bias_BWH + gather_rows(self.gap_GH, gap_BW)
        bias_BWH = bias_BWH.masked_fill((event_BW == 0)[:, :, None], MASKED_SCORE)
        return attend(
            query_MD / math.sqrt(head_width),
            key_BSD=key_BWD,
            value_BSD=value_BWD,
            bias_BHS=bias_BWH.mT,
            num_heads=self.num_heads,
            candidates=candidates,
        )


class Head(nn.Module):
    """One logit per candidate: agreement of what it found with its item, a small network over state and item, and a
    score of the item alone, by which popularity is learned."""

    def __init__(self, width: int, *, hidden: int, initial_agreement: float) -> None:
        super().__init__()
        self.width, self.hidden = width, hidden
        self.item = nn.Linear(width, width + hidden + 1)
        # Agreement is similarity at first.
        nn.init.eye_(self.item.weight.data[:width]).mul_(initial_agreement)
        self.state = nn.Linear(width, hidden, bias=False) if hidden else None
        self.last = nn.Linear(hidden, 1, bias=False) if hidden else None

    def forward(self, state_MD: Tensor, *, item_ID: Tensor, item_M: Tensor) -> Tensor:
        target_ID, hidden_IX, popularity_I = self.item(item_ID).split([self.width, self.hidden, 1], -1)
        # What the candidate found, not the candidate: its own square tells nothing of the history and differs by item.
        found_MD = state_MD - gather_rows(item_ID, item_M)
        logit_M = (found_MD * gather_rows(target_ID, item_M)).sum(-1) / math.sqrt(self.width)
        logit_M = logit_M + gather_rows(popularity_I, item_M).squeeze(-1)
        if self.state is not None and self.last is not None:
            logit_M = logit_M + self.last(F.relu(self.state(state_MD) + gather_rows(hidden_IX, item_M))).squeeze(-1)
        return logit_M

"""Sums over growing histories: every prefix that some request reads, each event touched once.

    user 0    a b c | d e | f        prefixes in use: abc, abcde, abcdef
              span    span  span     a prefix is the one before it, decayed, plus its own span

    sum_KHLD[k] = sum over the events n of prefix k of 2^(-age_n / half_life) left_NHL[n] (x) right_NHD[n]

SVD-Attention's Gram (left = right = the events), linear attention's state (left = features of the keys, right = values)
and learned pooling (left = weights) are such sums. Nothing has size events x candidates, no history is padded to the
longest, and memory grows with events plus prefixes.
The letters are those of models/interface.py; K counts prefixes, L and D are widths of the two sides, S counts segments
(a span, or its part on one side of EXACT_EVENTS), G chunks of E events. What says where things are lives on the host.
"""



import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_EVENTS = 128
"""Events of one product where spans are short: the products of a batch take CHUNK_EVENTS / L times less memory than
its events."""
LONG_SPAN = 64
"""Mean events of a span from which, on a CPU, one product a span without any copy beats a batched one: forward and
backward of 80,000 events of width 64 take 185 ms against 244 at 64 events a span, 46 against 89 at 512 (one core)."""
RUN_EVENTS = 1024
"""Events of one product where spans are long. A Gram of 10,000 events is off by 3e-8 of its norm so, and by 1.1e-7 as
one float32 product."""
EXACT_EVENTS = 128
"""A history's first so many events are multiplied in float64, later ones in float32 in short runs that are summed in
float64. What may be short of rank is exact so; what is long costs a third."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefixes:
    """The K distinct non-empty prefixes that some request uses, by user, then by length. All on the host."""

    start_K: Tensor
    """[K] int64: row in N of the user's first event."""
    length_K: Tensor
    """[K] int64: events of the prefix, at least 1."""
    previous_K: Tensor
    """[K] int64: events of the user's previous prefix, or 0; the span lies between the two."""
    rank_K: Tensor
    """[K] int64: shorter prefixes of the same user."""
    place_B: Tensor
    """[B] int64: 1 + the prefix of each request; 0 for the empty history."""

    @staticmethod
    def of_requests(event_offsets_U1: Tensor, *, user_B: Tensor, length_B: Tensor) -> Prefixes:
        """Request b reads the first length_B[b] events of user_B[b]."""
        stride = int(length_B.max()) + 1 if length_B.numel() else 1
        key_K, inverse = torch.unique((user_B * stride + length_B)[length_B > 0], return_inverse=True)
        user_K, length_K = key_K // stride, key_K % stride
        place_K = torch.arange(key_K.numel())
        joins_K = torch.zeros_like(place_K, dtype=torch.bool)
        joins_K[1:] = user_K[1:] == user_K[:-1]
        first_K = torch.where(joins_K, 0, place_K)
        return Prefixes(
            start_K=event_offsets_U1[user_K],
            length_K=length_K,
            previous_K=torch.where(joins_K, length_K.roll(1), 0),
            rank_K=place_K - (first_K.cummax(0).values if key_K.numel() else first_K),
            place_B=torch.zeros_like(length_B).masked_scatter(length_B > 0, inverse + 1),
        )

    def weight_K(self, half_life: float) -> Tensor:
        """[K] float64: the sum of the weights of a prefix's events; its number of events without decay."""
        count_K = self.length_K.double()
        if not half_life:
            return count_K
        step = 2.0 ** (-1.0 / half_life)
        return (1 - step**count_K) / (1 - step)

    def outer_sums(self, left_NHL: Tensor, right_NHD: Tensor, *, half_life: float = 0.0) -> tuple[Tensor, Tensor]:
        """(sum_KHLD, right_KHD) in float64; right_KHD is the same sum of right_NHD alone, without gradient.

        `half_life` in events; 0 = every event weighs 1. The latest event of a prefix always does.
        """
        device, num_prefixes = right_NHD.device, self.length_K.numel()
        root_N = torch.ones(right_NHD.shape[0], dtype=right_NHD.dtype, device=device)
        decay_K = torch.ones(num_prefixes, dtype=torch.float64)
        if half_life:
            root_N = self._weight_N(half_life, root_N.numel()).sqrt().to(root_N, non_blocking=True)
            decay_K = torch.exp2(-(self.length_K - self.previous_K).double() / half_life)
            same, right_NHD = left_NHL is right_NHD, right_NHD * root_N[:, None, None]
            left_NHL = right_NHD if same else left_NHL * root_N[:, None, None]
        spans = self._spans(exact=right_NHD.dtype == torch.float64)
        long = int((self.length_K - self.previous_K).sum()) >= LONG_SPAN * num_prefixes
        if long and device.type == "cpu":
            found = _LongProducts.apply(left_NHL, right_NHD, root_N, spans, left_NHL is right_NHD)
        else:
            found = _batched_products(left_NHL, right_NHD, root_N, spans)
        running = _Running.of(self.rank_K, decay_K=decay_K, device=device)
        return _RunningSum.apply(found[0], running), _RunningSum.apply(found[1], running)

    def _weight_N(self, half_life: float, num_events: int) -> Tensor:
        """[N] float64: 2^(-age / half_life) at the end of the event's span; 0 for events of no prefix."""
        span_K = self.length_K - self.previous_K
        age_n = (span_K.cumsum(0) - 1).repeat_interleave(span_K) - torch.arange(int(span_K.sum()))
        row_n = (self.start_K + self.length_K - 1).repeat_interleave(span_K) - age_n
        return torch.zeros(num_events, dtype=torch.float64).index_put((row_n,), torch.exp2(-age_n.double() / half_life))

    def _spans(self, *, exact: bool) -> _Spans:
        cut_K = self.length_K if exact else self.length_K.clamp(max=EXACT_EVENTS)
        segments = []
        for dtype, first_K, last_K in (
            (torch.float64, torch.minimum(self.previous_K, cut_K), cut_K),
            (torch.float32, torch.maximum(self.previous_K, cut_K), self.length_K),
        ):
            prefix_S = torch.nonzero(last_K > first_K).squeeze(1)
            if prefix_S.numel():
                first_S, length_S = (self.start_K + first_K)[prefix_S], (last_K - first_K)[prefix_S]
                segments.append(_Segments(prefix_S=prefix_S, first_S=first_S, length_S=length_S, dtype=dtype))
        return _Spans(num_prefixes=self.length_K.numel(), segments=segments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Segments:
    """Runs of rows, each of one prefix, whose products are taken in one dtype. On the host."""

    prefix_S: Tensor
    first_S: Tensor
    length_S: Tensor
    dtype: torch.dtype

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First row and the one after the last, of each."""
        return list(zip(self.first_S.tolist(), (self.first_S + self.length_S).tolist(), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spans:
    """The spans of all prefixes, cut where the dtype of the products changes."""

    num_prefixes: int
    segments: list[_Segments]


def _batched_products(left_NHL: Tensor, right_NHD: Tensor, root_N: Tensor, spans: _Spans) -> tuple[Tensor, Tensor]:
    """Per prefix, in float64: the products left (x) right over its span, and the sum of root_n right_n.

    Segments are cut into chunks of equally many events; only the last chunk of each is padded.
    """
    widths = (right_NHD.shape[1], left_NHL.shape[2], right_NHD.shape[2])
    product_KHLD = right_NHD.new_zeros(spans.num_prefixes, *widths, dtype=torch.float64)
    sum_KHD = right_NHD.new_zeros(spans.num_prefixes, widths[0], widths[2], dtype=torch.float64)
    for segments in spans.segments:
        row_GE, absent_GE, prefix_G = (
            index.to(right_NHD.device, non_blocking=True) for index in _chunks_of(segments, most=CHUNK_EVENTS)
        )

        def chunks(value: Tensor, row_GE=row_GE, absent_GE=absent_GE, dtype=segments.dtype) -> Tensor:
            """[G, H, E, width]; rows beyond a segment are zero."""
            found = F.embedding(row_GE, value.flatten(1)).to(dtype).masked_fill(absent_GE[:, :, None], 0.0)
            return found.unflatten(2, value.shape[1:]).transpose(1, 2)

        right = chunks(right_NHD)
        left = right if left_NHL is right_NHD else chunks(left_NHL)
        product_KHLD = product_KHLD.index_add(0, prefix_G, torch.matmul(left.mT, right).double())
        root_G11E = root_N[row_GE].to(segments.dtype)[:, None, None, :]
        sum_KHD.index_add_(0, prefix_G, torch.matmul(root_G11E, right.detach()).squeeze(2).double())
    return product_KHLD, sum_KHD


def _chunks_of(segments: _Segments, *, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row_GE, absent_GE, prefix_G): chunks as long as the mean segment allows, up to `most` events."""
    chunk = max(1, min(int(segments.length_S.sum()) // segments.length_S.numel(), most))
    count_S = (segments.length_S + chunk - 1) // chunk
    segment_G = torch.repeat_interleave(count_S)
    chunk_G = torch.arange(segment_G.numel()) - (count_S.cumsum(0) - count_S)[segment_G]
    place_GE = (chunk_G * chunk)[:, None] + torch.arange(chunk)
    absent_GE = place_GE >= segments.length_S[segment_G][:, None]
    row_GE = segments.first_S[segment_G][:, None] + place_GE.masked_fill(absent_GE, 0)
    return row_GE, absent_GE, segments.prefix_S[segment_G]


class _LongProducts(torch.autograd.Function):
    """The same for long spans on a CPU: views of the rows, no gather, nothing saved but the two sides."""

    @staticmethod
    def forward(
        ctx: Any, left_NHL: Tensor, right_NHD: Tensor, root_N: Tensor, spans: _Spans, same: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(left_NHL, right_NHD)
        ctx.same, ctx.spans = same, spans
        widths = (right_NHD.shape[1], left_NHL.shape[2], right_NHD.shape[2])
        product_KHLD = torch.zeros(spans.num_prefixes, *widths, dtype=torch.float64)
        sum_KHD = torch.zeros(spans.num_prefixes, widths[0], widths[2], dtype=torch.float64)
        for segments in spans.segments:
            root_N1 = root_N.to(segments.dtype)[:, None]
            for h in range(widths[0]):
                products, sums = [], []
                for first, stop in segments.bounds:
                    right_nD = right_NHD[first:stop, h].to(segments.dtype)
                    left_nL = right_nD if same else left_NHL[first:stop, h].to(segments.dtype)
                    products.append(_in_runs(left_nL, right_nD))
                    sums.append(_in_runs(root_N1[first:stop], right_nD)[0])
                # A prefix has at most one segment of each dtype.
                product_KHLD[segments.prefix_S, h] += torch.stack(products)
                sum_KHD[segments.prefix_S, h] += torch.stack(sums)
        ctx.mark_non_differentiable(sum_KHD)
        return product_KHLD, sum_KHD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, product_bar: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        left_NHL, right_NHD = ctx.saved_tensors
        if ctx.same:
            product_bar = product_bar + product_bar.mT
        left_bar = _gradient_of(left_NHL, ctx.spans) if ctx.needs_input_grad[0] else None
        right_bar = _gradient_of(right_NHD, ctx.spans) if ctx.needs_input_grad[1] and not ctx.same else None
        for segments in ctx.spans.segments:
            bar_SHLD = product_bar[segments.prefix_S].to(segments.dtype)
            for s, (first, stop) in enumerate(segments.bounds):
                for h in range(right_NHD.shape[1]):
                    if left_bar is not None:
                        left_bar[first:stop, h] = right_NHD[first:stop, h].to(segments.dtype) @ bar_SHLD[s, h].T
                    if right_bar is not None:
                        right_bar[first:stop, h] = left_NHL[first:stop, h].to(segments.dtype) @ bar_SHLD[s, h]
        return left_bar, right_bar, None, None, None


def _in_runs(left_nL: Tensor, right_nD: Tensor) -> Tensor:
    """left^T right from products of at most RUN_EVENTS rows, which are summed in float64."""
    whole = right_nD.shape[0] // RUN_EVENTS
    if not whole:
        return left_nL.T @ right_nD
    cut = whole * RUN_EVENTS
    left, right = (side[:cut].unflatten(0, (whole, RUN_EVENTS)) for side in (left_nL, right_nD))
    return torch.bmm(left.mT, right).sum(0, dtype=torch.float64) + left_nL[cut:].T @ right_nD[cut:]


def _gradient_of(value: Tensor, spans: _Spans) -> Tensor:
    """Zero where no prefix reads; not even written where all rows will be."""
    read = sum(int(segments.length_S.sum()) for segments in spans.segments)
    return torch.empty_like(value) if read == value.shape[0] else torch.zeros_like(value)


@dataclasses.dataclass(frozen=True)
class _Running:
    """Per step of the running sum: the prefixes that have so many before them, and their decays."""

    steps: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def of(rank_K: Tensor, *, decay_K: Tensor, device: torch.device) -> _Running:
        by_rank = torch.argsort(rank_K, stable=True)
        sizes = torch.bincount(rank_K).tolist() if rank_K.numel() else []
        rows = by_rank.to(device, non_blocking=True).split(sizes)
        decays = decay_K[by_rank].to(device, non_blocking=True).split(sizes)
        return _Running(tuple(zip(rows[1:], decays[1:], strict=True)))


class _RunningSum(torch.autograd.Function):
    """In place, value[k] += decay[k] * value[k - 1] within each user, shortest prefix first: as many steps as the most
    prefixes of a user. A user's sum never holds another user's rounding error."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, running: _Running) -> Tensor:
        ctx.running = running
        ctx.mark_dirty(value)
        for row_k, decay_k in running.steps:
            value.index_add_(0, row_k, value[row_k - 1] * decay_k.view(-1, *[1] * (value.dim() - 1)))
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, result_bar: Tensor) -> tuple[Tensor, None]:
        value_bar = result_bar.clone()
        for row_k, decay_k in reversed(ctx.running.steps):
            value_bar.index_add_(0, row_k - 1, value_bar[row_k] * decay_k.view(-1, *[1] * (value_bar.dim() - 1)))
        return value_bar, None

"""SVD-Attention: softmax attention over the few principal components of a history instead of over its events.

    X_ND ~ U_R S_R V_R^T          P_RD = S_R V_R^T = U_R^T X    the interests: U is never needed
    K = P W_K,  V = P W_V         O = softmax(Q K^T / tau) V    over R interests, not over N events

The idea is SOLAR's (arXiv 2603.02561); its code is not public. Inferred and checked here: the Gram form
X^T X = V S^2 V^T, the canonical sign, the division by sqrt(N) with a learned temperature, the mask of degenerate
components and the stable gradient. Lemma (tested): if rank(X) <= R then Q (X W_K)^T (X W_V) = Q K^T V for every Q.
Softmax over R interests is another function than softmax over N events, even then.

Each thing is written twice: the reference form, readable and slow, above the fast form that the models use.
The letters are those of models/interface.py; K counts histories (models/checkpoints.py: one per checkpoint in use).
"""



import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn



GRADIENT_EPS = 1e-6
"""Damping of the eigenvector gradient, relative to the pair of eigenvalues. Against the exact gradient: cosine 1.000,
0.998, 0.946 at rank 8, 16, 32; finite for every input. Relative to the largest eigenvalue it would be 0.62."""
START_TEMPERATURE = 6.0
"""P / sqrt(N) alone gives nearly uniform weights (entropy 3.45 of 3.47 at 32 interests): start at 4 to 8 times that."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decomposition:
    """How interests are taken from a Gram."""

    rank: int
    """R, at least 1 and at most D."""
    gradient: Literal["stable", "exact", "stop"] = "stable"
    """stable: damped by `gradient_eps`; exact: explodes where eigenvalues meet; stop: U is a constant, which is another
    estimator (P = U^T X with gradient to X alone) and here as an ablation."""
    gradient_eps: float = GRADIENT_EPS
    """Damping of the stable gradient."""
    canonical_sign: bool = True
    """Interests point along the sum of the events; off, their signs are LAPACK's: an ablation."""
    divide_by_events: bool = True
    """Interests are divided by sqrt(N), so that attention does not sharpen as a history grows; off: an ablation."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank = {self.rank} must be at least 1")
        if self.gradient not in ("stable", "exact", "stop"):
            raise ValueError(f"gradient = {self.gradient!r} must be stable, exact or stop")
        if not 0 < self.gradient_eps < 1:
            raise ValueError(f"gradient_eps = {self.gradient_eps} must be above 0 and below 1; 1e-6 was measured best")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interests:
    """The principal components of K histories, strongest first."""

    interest_KRD: Tensor
    """[K, R, D] S_R V_R^T / sqrt(N) with the canonical sign, in the Gram's dtype; zero where not valid."""
    valid_KR: Tensor
    """[K, R] bool: the component stands above the rounding noise of the Gram."""
    singular_KR: Tensor
    """[K, R] singular values of the history (not divided by sqrt(N)), without gradient."""
    energy_K: Tensor
    """[K] sum of all squared singular values, without gradient."""


def reference_interests(history_ND: Tensor, *, rank: int, half_life: float = 0.0) -> Tensor:
    """Interests of one history by its singular value decomposition, in float64.

        interest_RD = sign_i s_i v_i / sqrt(sum_n w_n),   sign_i = sign(v_i . sum_n w_n x_n)

    The decomposition is that of sqrt(w_n) x_n, with w_n = 2^(-age_n / half_life), or 1 where half_life is 0. Zero rows
    stand for components that do not exist or lie below the mask of a float64 Gram.
    """
    history_ND = history_ND.double()
    num_events, width = history_ND.shape
    interest_RD = history_ND.new_zeros(rank, width)
    if num_events == 0:
        return interest_RD
    age_N = torch.arange(num_events - 1, -1, -1, dtype=torch.float64)
    weight_N = 2.0 ** (-age_N / half_life) if half_life else torch.ones_like(age_N)
    _, singular, direction = torch.linalg.svd(history_ND * weight_N.sqrt()[:, None], full_matrices=False)
    for i in range(min(rank, singular.numel())):
        if singular[i] > math.sqrt(width * torch.finfo(torch.float64).eps) * singular[0]:
            sign = -1.0 if direction[i] @ (weight_N @ history_ND) < 0 else 1.0
            interest_RD[i] = sign * singular[i] * direction[i] / weight_N.sum().sqrt()
    return interest_RD


def interests_from_gram(
    gram_KDD: Tensor, *, sum_KD: Tensor, weight_K: Tensor, how: Decomposition, single_K: Tensor | None = None
) -> Interests:
    """Interests of K histories from G = X^T X, the sum of their events and of their weights: equal to the reference.

    `weight_K` is the number of events where nothing decays. Components with s_i <= sqrt(D eps) s_1 are masked: rounding
    leaves nothing of them. `single_K` (bool, on the host) says which histories are decomposed in float32, whose eps
    then counts; the others are in the Gram's dtype. ValueError: more interests than D.
    """
    width = gram_KDD.shape[-1]
    if how.rank > width:
        raise ValueError(f"rank = {how.rank} must not exceed the width {width} of the events; lower rank")
    stop = how.gradient == "stop"
    if single_K is None:
        single_K = torch.zeros(gram_KDD.shape[0], dtype=torch.bool)
    value_KD, direction_KRD = _StableEigh.apply(
        gram_KDD.detach() if stop else gram_KDD,
        how.rank,
        how.gradient_eps if how.gradient == "stable" else 0.0,
        single_K,
    )
    value_KR = value_KD[:, : how.rank]
    eps_K = torch.where(single_K, torch.finfo(torch.float32).eps, torch.finfo(gram_KDD.dtype).eps)
    floor_K1 = width * eps_K.to(value_KD, non_blocking=True)[:, None] * value_KD[:, :1].detach()
    valid_KR = value_KR.detach() > floor_K1
    # The square root of a masked value is never taken: its gradient would be infinite at zero.
    singular_KR = torch.where(valid_KR, value_KR, 1.0).sqrt() * valid_KR
    scale_KR = singular_KR
    if how.divide_by_events:
        scale_KR = scale_KR / torch.where(weight_K > 0, weight_K, 1.0).sqrt()[:, None]
    if how.canonical_sign:
        # A singular vector's sign is arbitrary. This choice does not depend on the order of the events or the batch.
        negative_KR = (direction_KRD.detach() @ sum_KD.detach()[:, :, None]).squeeze(-1) < 0
        scale_KR = scale_KR * torch.where(negative_KR, -1.0, 1.0)
    if stop:
        # v^T G / s^2 = v^T, and the Gram's gradient reaches its right factor alone: that of P = (X v / s)^T X.
        safe_KR = torch.where(valid_KR, value_KR, 1.0)
        direction_KRD = (direction_KRD @ gram_KDD) / safe_KR[:, :, None]
    return Interests(
        interest_KRD=scale_KR[:, :, None] * direction_KRD,
        valid_KR=valid_KR,
        singular_KR=singular_KR.detach(),
        energy_K=value_KD.detach().sum(-1),
    )


def reference_svd_attention(
    query_MD: Tensor,
    *,
    interest_RD: Tensor,
    key_DD: Tensor,
    value_DD: Tensor,
    temperature_H: Tensor,
    softmax: bool = True,
) -> Tensor:
    """O = softmax(Q (P W_K)^T / tau) P W_V of one request, head by head; interests that are zero rows do not exist.

    tau = sqrt(D / H) / temperature. Without any interest the result is zero. Without softmax the form is bilinear.
    """
    interest_RD = interest_RD[interest_RD.abs().sum(1) > 0]
    heads = temperature_H.numel()
    if interest_RD.shape[0] == 0:
        return torch.zeros_like(query_MD)
    outputs = []
    for h, (query, key, value) in enumerate(
        zip(
            query_MD.chunk(heads, 1),
            (interest_RD @ key_DD).chunk(heads, 1),
            (interest_RD @ value_DD).chunk(heads, 1),
            strict=True,
        )
    ):
        score_MR = query @ key.T * temperature_H[h] / math.sqrt(query.shape[1])
        outputs.append((torch.softmax(score_MR, -1) if softmax else score_MR) @ value)
    return torch.cat(outputs, 1)


class SvdAttention(nn.Module):
    """Candidates attend to the interests of their request's history.

    W_K and W_V are linear and without bias, as the lemma asks: all that is not linear acts on events before the
    decomposition. One decomposition serves every head, layer and candidate of a request. `softmax` off is the bilinear
    form of the lemma: an ablation.
    """

    def __init__(self, width: int, *, num_heads: int, softmax: bool = True) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width = {width} must be a multiple of num_heads = {num_heads}; change one")
        self.num_heads, self.softmax = num_heads, softmax
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        start_as_similarity(self.key, self.value)
        self.log_temperature_H = nn.Parameter(torch.full((num_heads,), math.log(START_TEMPERATURE)))

    def forward(
        self, query_MD: Tensor, *, interests: Interests, checkpoint_B: Tensor, candidates: CandidateSets
    ) -> Tensor:
        """out_MD; zero for a request whose history has no interest."""
        interest_KRD = interests.interest_KRD.to(query_MD.dtype)
        scale = self.log_temperature_H.exp() / math.sqrt(query_MD.shape[1] / self.num_heads)
        key_KRD = self.key(interest_KRD) * scale.repeat_interleave(query_MD.shape[1] // self.num_heads)
        return attend(
            query_MD,
            key_BSD=gather_rows(key_KRD, checkpoint_B),
            value_BSD=gather_rows(self.value(interest_KRD), checkpoint_B),
            bias_BHS=mask_bias(interests.valid_KR, dtype=query_MD.dtype)[checkpoint_B][:, None],
            num_heads=self.num_heads,
            candidates=candidates,
            softmax=self.softmax,
        )


class _StableEigh(torch.autograd.Function):
    """Eigenvalues (not negative, largest first) and the R strongest eigenvectors, as rows, of symmetric matrices; the
    gradient stays finite.

        Gbar = V [diag(Lbar) + F o (V^T Vbar)] V^T
        F_ij = D_ij / (D_ij^2 + eps (l_i + l_j)^2),   D_ij = l_j - l_i

    Inferred; eps = 0 is the textbook gradient. Eigenvalues are divided by the largest first, so that squares of very
    large or small ones neither overflow nor vanish. Gbar is left as it comes: whatever made the symmetric G adds its
    transpose. Only the first R columns of Lbar and Vbar exist, which makes everything but the last product D x R.
    """

    @staticmethod
    def forward(ctx: Any, gram_KDD: Tensor, rank: int, eps: float, single_K: Tensor) -> tuple[Tensor, Tensor]:
        ctx.rank, ctx.eps = rank, eps
        ctx.groups = _same_precision(single_K, gram_KDD.device)
        values, vectors = zip(*(_eigh(gram_KDD[place_k], single=single) for place_k, single in ctx.groups), strict=True)
        value_KD = _assembled(ctx.groups, [value.flip(-1).clamp_min(0) for value in values])
        direction_KRD = _assembled(ctx.groups, [vector[:, :, -rank:].flip(-1).mT.to(gram_KDD) for vector in vectors])
        ctx.save_for_backward(value_KD, *vectors)
        return value_KD, direction_KRD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, value_bar_KD: Tensor, direction_bar_KRD: Tensor) -> tuple[Tensor | None, ...]:
        value_KD, *vectors = ctx.saved_tensors
        parts = []
        for (place_k, _), vector_kDD in zip(ctx.groups, vectors, strict=True):
            vector_kDD = vector_kDD.to(value_KD)
            value_kD, vector_bar_kDR = value_KD[place_k], direction_bar_KRD[place_k].mT
            largest_k11 = torch.where(value_kD[:, :1] > 0, value_kD[:, :1], 1.0)[:, :, None]
            # LAPACK's order, smallest first, is kept for the rows: only the R columns are turned.
            share_kD1 = value_kD.flip(-1)[:, :, None] / largest_k11
            share_k1R = value_kD[:, None, : ctx.rank] / largest_k11
            gap_kDR = share_k1R - share_kD1
            damped_kDR = gap_kDR**2 + ctx.eps * (share_k1R + share_kD1) ** 2
            safe_kDR = damped_kDR > torch.finfo(damped_kDR.dtype).tiny
            factor_kDR = torch.where(safe_kDR, gap_kDR / torch.where(safe_kDR, damped_kDR, 1.0), 0.0)
            # Divided last: two components below the mask can have a factor near the largest float, times 0.
            inner_kDR = factor_kDR * (vector_kDD.mT @ vector_bar_kDR) / largest_k11
            # The j-th strongest stands j-th from the end.
            inner_kDR[:, -ctx.rank :] += torch.diag_embed(value_bar_KD[place_k][:, : ctx.rank]).flip(1)
            parts.append(vector_kDD @ inner_kDR @ vector_kDD[:, :, -ctx.rank :].flip(-1).mT)
        return _assembled(ctx.groups, parts), None, None, None


def _same_precision(single_K: Tensor, device: torch.device) -> list[tuple[Any, bool]]:
    """(places, whether in float32) of the histories that are decomposed together."""
    if not bool(single_K.any()) or bool(single_K.all()):
        return [(slice(None), bool(single_K.any()))]
    return [
        (torch.nonzero(chosen_K).squeeze(1).to(device, non_blocking=True), single)
        for chosen_K, single in ((~single_K, False), (single_K, True))
    ]


def _assembled(groups: list[tuple[Any, bool]], parts: list[Tensor]) -> Tensor:
    """The parts back in the order of all histories."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    for (place_k, _), part in zip(groups, parts, strict=True):
        whole[place_k] = part
    return whole


def _eigh(gram_kDD: Tensor, *, single: bool) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh; in float32 190 us instead of 305 at D = 64 (one core), with the values in the Gram's dtype.

    A Gram of any scale fits float32 after division by its trace.
    """
    if not single:
        return torch.linalg.eigh(gram_kDD)
    trace_k = gram_kDD.diagonal(dim1=1, dim2=2).sum(1)
    trace_k = torch.where(trace_k > 0, trace_k, 1.0)
    value_kD, vector_kDD = torch.linalg.eigh((gram_kDD / trace_k[:, None, None]).float())
    return value_kD.to(gram_kDD.dtype) * trace_k[:, None], vector_kDD

"""Interests of growing histories: one decomposition every few events, shared by all requests until the next.

    user 0, every = 2    a b | c d | e        request at position 5 -> checkpoint 2 (a b c d)
                                              request at position 1 -> row 0, the empty history

The same in training (many requests of a user in one pass) and in serving (stored interests + latest events). What a
request misses, the events since its checkpoint, is what exact attention over the latest events is for.
The letters are those of models/interface.py; K counts the checkpoints that requests use.
"""



import dataclasses

import torch
from torch import Tensor





def reference_checkpoint_interests(
    event_ND: Tensor,
    *,
    event_offsets_U1: Tensor,
    request_user_B: Tensor,
    request_position_B: Tensor,
    rank: int,
    every: int,
    half_life: float = 0.0,
) -> Tensor:
    """interest_BRD: per request, the interests of the user's events before the last checkpoint at or before it."""
    rows = []
    for user, position in zip(request_user_B.tolist(), request_position_B.tolist(), strict=True):
        start = int(event_offsets_U1[user])
        history_ND = event_ND[start : start + position // every * every]
        rows.append(reference_interests(history_ND, rank=rank, half_life=half_life))
    return torch.stack(rows) if rows else event_ND.new_zeros(0, rank, event_ND.shape[-1], dtype=torch.float64)


def checkpoint_interests(
    event_ND: Tensor,
    *,
    event_offsets_U1: Tensor,
    request_user_B: Tensor,
    request_position_B: Tensor,
    every: int,
    how: Decomposition,
    half_life: float = 0.0,
) -> tuple[Interests, Tensor]:
    """Interests at the checkpoints (every `every` events of a user) that some request uses, and checkpoint_B.

    Row 0 of the interests is the empty history: nothing valid, whose attention is 0. An event weighs
    2^(-age / half_life), age in events; 1 where half_life is 0. Offsets, users and positions are on the host.
    The Gram's chunks, sums and decomposition are as models/prefixes.py says, never under autocast.
    """
    with torch.autocast(event_ND.device.type, enabled=False):
        prefixes = Prefixes.of_requests(
            event_offsets_U1, user_B=request_user_B, length_B=request_position_B // every * every
        )
        event_N1D = event_ND[:, None]
        # An estimator that holds U constant differentiates one of the two factors of X^T X.
        left_N1D = event_N1D.detach() if how.gradient == "stop" else event_N1D
        gram_K1DD, sum_K1D = prefixes.outer_sums(left_N1D, event_N1D, half_life=half_life)
        interests = interests_from_gram(
            gram_K1DD[:, 0],
            sum_KD=sum_K1D[:, 0],
            weight_K=prefixes.weight_K(half_life).to(event_ND.device, non_blocking=True),
            how=how,
            single_K=(prefixes.length_K > EXACT_EVENTS) & (event_ND.dtype != torch.float64),
        )
    return _with_empty_history(interests), prefixes.place_B.to(event_ND.device, non_blocking=True)


def _with_empty_history(interests: Interests) -> Interests:
    """The same with a row 0 that is the history without events."""

    def prepend(value: Tensor) -> Tensor:
        return torch.cat([value.new_zeros(1, *value.shape[1:]), value])

    return Interests(**{field.name: prepend(getattr(interests, field.name)) for field in dataclasses.fields(interests)})

"""Candidates of one request attend to each other: permutation-equivariant, no positions, no other request.

Up to `exact_up_to` candidates the softmax runs over the set itself; above, over the principal components of the set, by
the same W_K and W_V (P = U^T C, so P W_K = U^T C W_K): O(T R) instead of O(T^2). The two are different functions; the
low-rank form for thousands of candidates follows SOLAR's set-aware claim, its details are inferred.
The letters are those of models/interface.py; b counts the requests of a group, T the candidates of each.
"""



import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn





class SetAttention(nn.Module):
    """out_MD from query, key and value projections of the candidates. Weights are its own, not of nn.Linear: they are
    used once a size group, and ZeRO-3 keeps a module's own parameters together for its whole forward."""

    def __init__(self, width: int, *, num_heads: int, rank: int, exact_up_to: int) -> None:
        super().__init__()
        self.num_heads, self.rank, self.exact_up_to = num_heads, rank, exact_up_to
        self.weight_4DD = nn.Parameter(torch.empty(4, width, width))
        """Query, key, value, output."""
        self.log_temperature_2H = nn.Parameter(torch.zeros(2, num_heads))
        """Row 0 for the exact, row 1 for the low-rank form."""
        nn.init.uniform_(self.weight_4DD, -1 / math.sqrt(width), 1 / math.sqrt(width))
        nn.init.constant_(self.log_temperature_2H[1], math.log(START_TEMPERATURE))

    def forward(self, candidate_MD: Tensor, *, candidates: CandidateSets) -> Tensor:
        query, key, value, output = self.weight_4DD.unbind(0)
        head_width = candidate_MD.shape[1] // self.num_heads
        scale_2D = (self.log_temperature_2H.exp() / math.sqrt(head_width)).repeat_interleave(head_width, 1)

        def compute(candidate_bTD: Tensor, present_bT: Tensor | None) -> Tensor:
            if present_bT is None:
                present_bT = torch.ones(candidate_bTD.shape[:2], dtype=torch.bool, device=candidate_bTD.device)
            seen_bSD, valid_bS, scale_D = candidate_bTD * present_bT[:, :, None], present_bT, scale_2D[0]
            if candidate_bTD.shape[1] > self.exact_up_to:
                interests = set_interests(seen_bSD, present_bT=present_bT, rank=self.rank)
                seen_bSD, valid_bS = interests.interest_KRD.to(candidate_bTD.dtype), interests.valid_KR
                scale_D = scale_2D[1]
            return attend_dense(
                F.linear(candidate_bTD, query),
                key_bSD=F.linear(seen_bSD, key) * scale_D,
                value_bSD=F.linear(seen_bSD, value),
                bias_bHS=mask_bias(valid_bS, dtype=candidate_bTD.dtype)[:, None],
                num_heads=self.num_heads,
            )

        return F.linear(candidates.map(compute, candidate_MD), output)


def set_interests(candidate_bTD: Tensor, *, present_bT: Tensor, rank: int) -> Interests:
    """The principal components of each set; absent candidates are zero rows."""
    with torch.autocast(candidate_bTD.device.type, enabled=False):
        rows_bTD = candidate_bTD.double()
        return interests_from_gram(
            rows_bTD.mT @ rows_bTD,
            sum_KD=rows_bTD.sum(1),
            weight_K=present_bT.sum(1).double(),
            how=Decomposition(rank=rank),
        )

"""SOLAR: candidates attend to the interests of a lifelong history, to its latest events, and to each other.

    block:  C += W_O [SVDAttention(norm(C), interests) + RecentAttention(norm(C), latest W events)]
            C += SetAttention(norm(C))
            C += FFN(norm(C))
    head:   logit = <C - item, W item> / sqrt(D) + MLP([C, item]) + popularity(item)  [+ repeats(item, history)]

What is known of a request beside its history (request_features.py) shifts the first query and the C of the head.

The operator and the set-wise view are SOLAR's (arXiv 2603.02561, Kuaishou, 2026), which published no code: block, head
and every size are inferred. The recent window is ours: interests are a set and lose the order of events.
The letters are those of models/interface.py.
"""



import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn









@dataclasses.dataclass(frozen=True, kw_only=True)
class SolarConfig(TowerConfig):
    """Size and parts of SOLAR. Every part can be switched off."""

    num_layers: int = 1
    """Blocks, 1 to 2. All of them read one decomposition."""
    interests: bool = True
    """Attend to the principal components of the history before the request's checkpoint."""
    rank: int = 16
    """R, interests of a history; at most `width`."""
    checkpoint_every: int = 16
    """Events between two decompositions of a user's growing history."""
    half_life: float = 0.0
    """Events after which an event weighs half in the interests; 0 = all weigh the same."""
    gradient: Literal["stable", "exact", "stop"] = "stable"
    """Through the decomposition (models/svd_attention.py); exact and stop are ablations."""
    canonical_sign: bool = True
    """Interests point along the sum of their events; off is an ablation."""
    divide_by_events: bool = True
    """Interests are divided by the square root of the history's length; off is an ablation."""
    softmax: bool = True
    """Over the interests; off (the bilinear form) is an ablation."""
    set_attention: bool = True
    """Candidates of a request attend to each other. Better off where negatives are sampled: training then sees sets of
    17 and evaluation the whole catalogue (MovieLens-100K, next item: no better, and 30 % slower)."""
    set_attention_exact_up_to: int = 2048
    """Candidates of a set up to which that is exact; above, candidates attend to the set's principal components."""
    ffn_multiple: int = 0
    """Hidden width of the feed-forward network of a block, in widths; 0 switches it off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "checkpoint_every"):
            self._refuse_below(name, 1)
        for name in ("set_attention_exact_up_to", "ffn_multiple"):
            self._refuse_below(name, 0)
        if self.rank > self.width:
            raise ValueError(f"rank = {self.rank} must not exceed width = {self.width}; lower rank or raise width")
        if self.num_layers not in (1, 2):
            raise ValueError(f"num_layers = {self.num_layers} must be 1 or 2")
        if not 0 <= self.half_life < math.inf:
            raise ValueError(f"half_life = {self.half_life} must be a number of events, or 0 to let nothing decay")
        if self.interests and 0 < self.recent_window < self.checkpoint_every:
            raise ValueError(
                f"recent_window = {self.recent_window} must be at least checkpoint_every = {self.checkpoint_every}, or "
                "events after a checkpoint would be seen by neither; raise recent_window or lower checkpoint_every"
            )
        if not self.interests and self.recent_window == 0:
            raise ValueError("interests = false and recent_window = 0 leave no history; switch one of them on")
        self.decomposition  # noqa: B018 (refuses what it cannot be)

    @property
    def decomposition(self) -> Decomposition:
        """How interests are taken."""
        return Decomposition(
            rank=self.rank,
            gradient=self.gradient,
            canonical_sign=self.canonical_sign,
            divide_by_events=self.divide_by_events,
        )


class Solar(HistoryTower):
    """The tower. `num_features` is F, the number of item features of the tables."""

    def __init__(self, config: SolarConfig, *, num_features: int) -> None:
        super().__init__(config, num_features=num_features)
        self.config = config
        self.blocks = nn.ModuleList(SolarBlock(config) for _ in range(config.num_layers))

    def states(
        self,
        item_ID: Tensor,
        *,
        event_ND: Tensor,
        query_shift_MD: Tensor | None,
        inputs: ModelInput,
        candidates: CandidateSets,
    ) -> Tensor:
        history = self._history(event_ND, inputs)
        # The first block reads items, not candidates: what a candidate needs before it meets its request is computed
        # once per distinct item.
        state = item_ID
        for i, block in enumerate(self.blocks):
            state = block(
                state,
                item_M=inputs.candidate_item_M if i == 0 else None,
                query_shift_MD=query_shift_MD if i == 0 else None,
                history=history,
                candidates=candidates,
            )
        return state

    @torch.no_grad()
    def interests(self, inputs: ModelInput) -> tuple[Interests, Tensor]:
        """The spectrum of real users: interests at the checkpoints in use, and checkpoint_B.

        `singular_KR[k] ** 2 / energy_K[k]` is the share of a history's energy that each component holds.
        """
        item_ID = self.items(inputs.item_IC, inputs.features_IFC)
        history = self._history(self.events(item_ID, inputs), inputs)
        if history.interests is None:
            raise ValueError("interests = false: this model has no spectrum; switch interests on")
        assert history.checkpoint_B is not None
        return history.interests, history.checkpoint_B

    def _history(self, event_ND: Tensor, inputs: ModelInput) -> History:
        config = self.config
        if not config.interests:
            return History(event_ND=event_ND, inputs=inputs, interests=None, checkpoint_B=None)
        interests, checkpoint_B = checkpoint_interests(
            event_ND,
            event_offsets_U1=inputs.event_offsets_U1,
            request_user_B=inputs.request_user_B,
            request_position_B=inputs.request_position_B,
            every=config.checkpoint_every,
            how=config.decomposition,
            half_life=config.half_life,
        )
        return History(event_ND=event_ND, inputs=inputs, interests=interests, checkpoint_B=checkpoint_B)


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """All histories of a batch, as the blocks read them."""

    event_ND: Tensor
    """[N, D] normalised event vectors."""
    inputs: ModelInput
    """Where they belong."""
    interests: Interests | None
    """Interests at the checkpoints in use, or None where they are switched off."""
    checkpoint_B: Tensor | None
    """[B] row of `interests` that a request reads; 0 is the empty history. None as `interests`."""


class SolarBlock(nn.Module):
    """state_MD after one round of attention to the history, to the set, and a feed-forward network."""

    def __init__(self, config: SolarConfig) -> None:
        super().__init__()
        width, heads = config.width, config.num_heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.lifelong = SvdAttention(width, num_heads=heads, softmax=config.softmax) if config.interests else None
        self.recent = RecentAttention(config) if config.recent_window else None
        self.output = nn.Linear(width, width, bias=False)
        start_as_similarity(self.query, self.output)
        self.set_norm = nn.LayerNorm(width) if config.set_attention else None
        self.set = (
            SetAttention(width, num_heads=heads, rank=config.rank, exact_up_to=config.set_attention_exact_up_to)
            if config.set_attention
            else None
        )
        self.ffn_norm = nn.LayerNorm(width) if config.ffn_multiple else None
        self.ffn = (
            nn.Sequential(
                nn.Linear(width, config.ffn_multiple * width), nn.ReLU(), nn.Linear(config.ffn_multiple * width, width)
            )
            if config.ffn_multiple
            else None
        )

    def forward(
        self,
        state: Tensor,
        *,
        item_M: Tensor | None,
        query_shift_MD: Tensor | None,
        history: History,
        candidates: CandidateSets,
    ) -> Tensor:
        """`state` is [M, D], or [I, D] with `item_M` in the first block, where the request shifts the query too."""
        query_MD = self.query(self.norm(state))
        if item_M is not None:
            state, query_MD = gather_rows(state, item_M), gather_rows(query_MD, item_M)
        if query_shift_MD is not None:
            query_MD = query_MD + query_shift_MD
        found = []
        if self.lifelong is not None and history.interests is not None and history.checkpoint_B is not None:
            found.append(
                self.lifelong(
                    query_MD, interests=history.interests, checkpoint_B=history.checkpoint_B, candidates=candidates
                )
            )
        if self.recent is not None:
            found.append(self.recent(query_MD, event_ND=history.event_ND, inputs=history.inputs, candidates=candidates))
        state = state + self.output(found[0] if len(found) == 1 else found[0] + found[1])
        if self.set is not None and self.set_norm is not None:
            state = state + self.set(self.set_norm(state), candidates=candidates)
        if self.ffn is not None and self.ffn_norm is not None:
            state = state + self.ffn(self.ffn_norm(state))
        return state

"""What a registered model is asked, as flat arrays: histories in total order, candidates, times.

    history [[a, b], [], [c]]    ->    offsets [0, 2, 2, 3]    row [row of a, of b, of c]

Exported into `scorer.py` beside jobs/scorer.py, so it imports numpy and pyarrow alone.
"""



import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NO_TIME = np.iinfo(np.int64).max
"""The time of a request that names none: later than every event, so that all of them are its history."""


class RequestError(ValueError):
    """A mistake in the requests: one line that names the column or row, the rule and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UserFeature:
    """What B requests say of their users: any number of values of one feature each."""

    lengths: np.ndarray
    """[B] int64."""
    row: np.ndarray
    """[lengths.sum()] int64 rows of the feature's table, by request."""

    def take(self, requests: np.ndarray) -> UserFeature:
        """That of these requests, in this order."""
        lengths = self.lengths[requests]
        return UserFeature(
            lengths=lengths, row=self.row[flat_ranges(flat_offsets(self.lengths)[:-1][requests], lengths)]
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Histories:
    """The histories of B requests, N events of all of them, each in the log's total order."""

    offsets: np.ndarray
    """[B + 1] int64: request b has events offsets[b] : offsets[b + 1]."""
    row: np.ndarray
    """[N] int64 rows of the model's item table."""
    time: np.ndarray
    """[N] int64 milliseconds since 1970 UTC, zeros where there are no times."""
    action: np.ndarray
    """[N] int64 action codes of the model."""
    users: tuple[UserFeature, ...] = ()
    """Who asks: one for each user feature of the model."""

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def owner(self) -> np.ndarray:
        """[N] the request of each event."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    def events(self, places: np.ndarray, lengths: np.ndarray) -> Histories:
        """The events at these places (or under this mask), `lengths` of them for each request."""
        return Histories(
            offsets=flat_offsets(lengths),
            row=self.row[places],
            time=self.time[places],
            action=self.action[places],
            users=self.users,
        )

    def take(self, requests: np.ndarray) -> Histories:
        """The histories of these requests, in this order."""
        lengths = self.lengths[requests]
        taken = self.events(flat_ranges(self.offsets[requests], lengths), lengths)
        return dataclasses.replace(taken, users=tuple(feature.take(requests) for feature in self.users))

    def before(self, time: np.ndarray) -> Histories:
        """The events strictly before each request's time [B]; all of them where that is NO_TIME."""
        earlier = self.time < time[self.owner]
        return self.events(earlier, np.bincount(self.owner[earlier], minlength=len(time)))

    def latest(self, most: int) -> Histories:
        """The latest `most` events of each request."""
        lengths = np.minimum(self.lengths, most)
        return self.events(flat_ranges(self.offsets[1:] - lengths, lengths), lengths)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lists:
    """A list column, flat."""

    offsets: np.ndarray
    """[B + 1] int64; a null list is an empty one."""
    values: pa.Array
    """[N], without nulls unless they are allowed."""
    is_null: np.ndarray
    """[B] bool: the list itself is null."""


def list_column(batch: pa.RecordBatch, name: str, *, values: str, first_row: int = 0, nulls: bool = False) -> Lists:
    """A column of lists of "int64", "string" or "time" (milliseconds since 1970 UTC, or timestamps).

    RequestError: the column is absent, is no list column, holds other values, or a null where `nulls` is false.
    """
    column = required_column(batch, name)
    kind = column.type
    if pa.types.is_null(kind):
        column = pa.nulls(len(column), pa.large_list(pa.null()))
    elif not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise RequestError(f"column {name!r} is {kind}: it must hold a list for each request")
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0)).astype(np.int64)  # type: ignore[attr-defined]
    offsets = flat_offsets(lengths)
    flat = pc.list_flatten(column)  # type: ignore[attr-defined]
    if flat.null_count and not nulls:
        place = int(np.flatnonzero(np.asarray(flat.is_null()))[0])
        row = first_row + int(np.searchsorted(offsets, place, side="right")) - 1
        raise RequestError(f"row {row}: column {name!r} holds a null in its list: leave the entry out, or give it")
    return Lists(offsets=offsets, values=cast_values(flat, name, values), is_null=np.asarray(column.is_null()))


def category_column(batch: pa.RecordBatch, name: str) -> tuple[np.ndarray, pa.Array]:
    """([B] how many values a request has, all of them as strings) of a column of categories or of lists of them.

    Nulls and empty strings are no value, as in a users table. RequestError: numbers with a fraction, or other types.
    """
    column = required_column(batch, name)
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        column = pa.LargeListArray.from_arrays(pa.array(np.arange(len(column) + 1)), column)
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0)).astype(np.int64)  # type: ignore[attr-defined]
    flat: Any = pc.list_flatten(column)  # type: ignore[attr-defined]
    if pa.types.is_dictionary(flat.type):
        flat = flat.cast(flat.type.value_type)
    kind = flat.type
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    ):  # fmt: skip
        raise RequestError(f"column {name!r} holds {kind}: a user feature is a category: cast it to strings")
    flat = flat.cast(pa.large_string())
    kept = np.asarray(pc.fill_null(pc.not_equal(flat, ""), False))  # type: ignore[attr-defined]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return np.bincount(owner[kept], minlength=len(lengths)), flat.filter(pa.array(kept))


def time_column(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """[B] int64 milliseconds since 1970 UTC of a column of such numbers or of timestamps; NO_TIME where it is null."""
    times = cast_values(required_column(batch, name), name, "time")
    return np.asarray(pc.fill_null(times, NO_TIME)).astype(np.int64)  # type: ignore[attr-defined]


def required_column(batch: pa.RecordBatch, name: str) -> pa.Array:
    if name not in batch.schema.names:
        raise RequestError(f"column {name!r} is missing: there are {', '.join(batch.schema.names) or 'none'}")
    return batch.column(batch.schema.get_field_index(name))


def refuse_other_lengths(name: str, lists: Lists, *, offsets: np.ndarray, first_row: int) -> None:
    """RequestError unless every list has one entry per event of the history that `offsets` delimits."""
    wrong = np.flatnonzero(np.diff(lists.offsets) != np.diff(offsets))
    if len(wrong):
        given, events = np.diff(lists.offsets)[wrong[0]], np.diff(offsets)[wrong[0]]
        raise RequestError(
            f"row {first_row + wrong[0]}: {name} and history differ in length ({given} and {events}): "
            "give one entry per event"
        )


def total_order(
    owner: np.ndarray, time: np.ndarray, item: pa.Array, action: pa.Array | None, *, ties_by_id: bool
) -> np.ndarray | None:
    """The places of N events by request, time and, where `ties_by_id`, raw item id and action; None = as they stand.

    Ids are compared as the log compares them: integers by value, strings by their UTF-8 bytes, no action first.
    Without `ties_by_id` (the log has a column `order` for that) events of one time stay as they are given.
    """
    follows = owner[1:] == owner[:-1]
    step = np.diff(time)
    if not np.any(follows & ((step <= 0) if ties_by_id else (step < 0))):
        return None
    keys = [time, owner]
    if ties_by_id:
        keys.insert(0, _ranks(item))
    if ties_by_id and action is not None:
        keys.insert(0, _ranks(pc.fill_null(action, "")))  # type: ignore[attr-defined]
    return np.lexsort(keys)


def cast_values(values: pa.Array, name: str, wanted: str) -> pa.Array:
    """A column's values as "int64", "string" or "time" (int64 milliseconds). RequestError: they are something else."""
    kind: Any = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.cast(kind.value_type), kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    try:
        if wanted == "string" and (text or pa.types.is_null(kind)):
            return values.cast(pa.large_string())
        if wanted in ("int64", "time") and (pa.types.is_integer(kind) or pa.types.is_null(kind)):
            return values.cast(pa.int64())
        if wanted == "time" and pa.types.is_timestamp(kind):
            return values.cast(pa.timestamp("ms", kind.tz), safe=False).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise RequestError(f"column {name!r} does not fit into int64: {error}") from error
    rule = {
        "int64": "integers, as the known ids are: cast it",
        "string": "strings, as the known ones are: cast it",
        "time": "timestamps, or integers that are milliseconds since 1970 UTC",
    }[wanted]
    raise RequestError(f"column {name!r} holds {kind}: it must hold {rule}")


def flat_offsets(lengths: np.ndarray) -> np.ndarray:
    """[n] lengths -> [n + 1] int64 offsets."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def flat_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), then starts[1], ..."""
    offsets = flat_offsets(lengths)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)


def _ranks(values: pa.Array) -> np.ndarray:
    """[N] int64 in the order of the values."""
    if pa.types.is_integer(values.type):
        return np.asarray(values)
    encoded = values.dictionary_encode()
    rank = np.empty(len(encoded.dictionary), np.int64)
    rank[np.asarray(pc.array_sort_indices(encoded.dictionary))] = np.arange(len(rank))  # type: ignore[attr-defined]
    return rank[np.asarray(encoded.indices)]

"""The registered model: requests (history, candidates) in, scores out; torch, numpy, pandas, pyarrow, safetensors only.

jobs/register.py writes this file, jobs/scorer_input.py and the model files that it imports into one `scorer.py` that
MLflow stores beside the weights and runs where this repository is unknown. `solar score` and evaluation run it too.

    import mlflow, pandas as pd
    model = mlflow.pyfunc.load_model("models:/solar-movielens-100k@champion")
    model.predict(pd.DataFrame({"history": [[50, 181]], "candidates": [[172, 1, 999999]]}))["scores"]

What a history is, here as in training: the events strictly before the request's time, in the log's total order (time,
then the log's `order` column, else raw item id and action), of these the latest max_history.
"""



import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from mlflow.pyfunc.model import PythonModel
from safetensors.torch import load_file
from torch import Tensor

















UNKNOWN_ROW = 1
FORWARD_ENTRIES = 1 << 16
"""Events plus candidates of one forward (about 1 KB each at width 64); a longer single request is a forward of its own,
or several where candidates do not attend to each other."""
REQUEST_ENTRIES = 128
"""What a request costs beside its events and candidates: its Gram matrix and decomposition, in float64."""


class Scorer(PythonModel):
    """Loads one exported model directory and scores requests.

    Columns of a request:
      history         item ids; oldest first, or in any order where history_time is given (it is sorted then); null = []
      candidates      item ids; one given twice is scored twice, an empty list has empty scores
      history_time    optional: milliseconds since 1970 UTC of each event (or timestamps); needed if the model uses time
      history_action  optional: action name of each event; null = none
      time            optional: milliseconds since 1970 UTC of the request (or a timestamp): only events strictly before
                      it are history, whose times must be given then. Null or absent = the last event's time, and every
                      event is history
      NAME            optional: the category, or list of categories, of the request's user in the user feature NAME
                      (scorer.json names them); null, [] or absent = none
    An unknown item or category has the untrained row 1, an unknown action is none. Lists of events hold no nulls.
    """

    def load_context(self, context: Any) -> None:
        self.load(Path(context.artifacts["model"]))

    def load(self, directory: Path) -> None:
        """Read what jobs/register.py exported."""
        self.settings = json.loads((directory / "scorer.json").read_text())
        items = pq.read_table(directory / "items.parquet")
        first = self.settings["first_item_row"]
        self.item_ids: pa.Array = items["item_id"].combine_chunks()
        """Raw ids (int64 or strings); item_ids[i] has row i + first_item_row."""
        self.item_type = "int64" if pa.types.is_integer(self.item_ids.type) else "string"
        self._index = pd.Index(self.item_ids.to_numpy(zero_copy_only=False))
        self._code_of_action = {name: code for code, name in enumerate(self.settings["actions"])}
        self.uses_time = bool(self.settings["model"].get("time_features"))
        self._ties_by_id = "order" not in self.settings["log_columns"]
        self.item_IC: Tensor = load_file(directory / "table-item.safetensors")["weight"]
        """[item rows, C]."""
        features = [
            _mean_rows(
                load_file(directory / f"table-{name}.safetensors")["weight"],
                items[name].to_pylist(),
                first,
                width=self.item_IC.shape[1],
            )
            for name in self.settings["features"]
        ]
        empty = torch.zeros(len(self.item_IC), 0, self.item_IC.shape[1])
        self.features_IFC: Tensor = torch.stack(features, dim=1) if features else empty
        """[item rows, F, C]: the mean of each item's feature rows."""
        self.user_features: list[str] = self.settings.get("user_features", [])
        """Names; each is the name of the column that says it of a request's user."""
        self.user_values: dict[str, list[str]] = {name: [] for name in self.user_features}
        """{user feature: its raw values}; value i has row i + first_item_row."""
        if self.user_features:
            listed = pq.read_table(directory / "user-values.parquet").to_pydict()
            for name, value in zip(listed["feature"], listed["value"], strict=True):
                self.user_values[name].append(value)
        self.user_tables: list[Tensor] = [
            load_file(directory / f"table-user-{name}.safetensors")["weight"] for name in self.user_features
        ]
        self._row_of_value = {
            name: {value: row for row, value in enumerate(values, start=first)}
            for name, values in self.user_values.items()
        }
        self.tower: Recommender = build_scorer_tower(self.settings["model"], num_features=len(features))
        self.tower.load_state_dict(load_file(directory / "model.safetensors"))
        self.tower.eval()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row of `scores` per request, in the order of its candidates; a logit each (sigmoid = probability)."""
        batch = _arrow(model_input, self.user_features)
        histories, time = self.histories(batch), self.request_times(batch)
        offsets, row = self.candidates(batch)
        logits = self.logits(*self.shown(histories, time), offsets, row)
        scores = [part.tolist() for part in np.split(logits, offsets[1:-1])] if len(offsets) > 1 else []
        return pd.DataFrame({"scores": scores}, index=model_input.index)

    def histories(self, batch: pa.RecordBatch, *, first_row: int = 0) -> Histories:
        """The columns history, history_time and history_action. RequestError counts rows from `first_row`."""
        items = list_column(batch, "history", values=self.item_type, first_row=first_row)
        offsets, names = items.offsets, batch.schema.names
        owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        row, time, action = self.rows(items.values), np.zeros(len(owner), np.int64), np.zeros(len(owner), np.int64)
        actions = None
        if "history_action" in names:
            actions = list_column(batch, "history_action", values="string", first_row=first_row, nulls=True)
            refuse_other_lengths("history_action", actions, offsets=offsets, first_row=first_row)
            actions = actions.values
            action = self.codes(actions)
        if self.uses_time:
            required_column(batch, "history_time")
        if "history_time" in names:
            times = list_column(batch, "history_time", values="time", first_row=first_row)
            refuse_other_lengths("history_time", times, offsets=offsets, first_row=first_row)
            time = np.asarray(times.values)
            order = total_order(owner, time, items.values, actions, ties_by_id=self._ties_by_id)
            if order is not None:
                row, time, action = row[order], time[order], action[order]
        return Histories(offsets=offsets, row=row, time=time, action=action, users=self.users(batch))

    def users(self, batch: pa.RecordBatch, *, known: tuple[UserFeature, ...] | None = None) -> tuple[UserFeature, ...]:
        """One for each user feature: its column where there is one, else what is `known` already, else no value."""
        found = []
        for place, name in enumerate(self.user_features):
            if name in batch.schema.names:
                lengths, values = category_column(batch, name)
                found.append(UserFeature(lengths=lengths, row=self.value_rows(name, values)))
            elif known is not None:
                found.append(known[place])
            else:
                found.append(UserFeature(lengths=np.zeros(batch.num_rows, np.int64), row=np.zeros(0, np.int64)))
        return tuple(found)

    def value_rows(self, name: str, values: pa.Array) -> np.ndarray:
        """int64 rows of a user feature's values, UNKNOWN_ROW for one that is not in the model."""
        encoded, row_of = values.dictionary_encode(), self._row_of_value[name]
        row = [row_of.get(value, UNKNOWN_ROW) for value in encoded.dictionary.to_pylist()]
        return _decoded(np.array(row, np.int64), encoded, UNKNOWN_ROW)

    def request_times(self, batch: pa.RecordBatch) -> np.ndarray:
        """[B] int64 of the column time, NO_TIME where it is null or absent. RequestError: history_time is absent."""
        if "time" not in batch.schema.names:
            return np.full(batch.num_rows, NO_TIME)
        time = time_column(batch, "time")
        if "history_time" not in batch.schema.names and (time < NO_TIME).any():
            raise RequestError("column 'time' needs 'history_time', to tell which events are earlier: give it too")
        return time

    def candidates(self, batch: pa.RecordBatch, *, first_row: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(offsets [B + 1], table rows [M]) of the column candidates. RequestError: a null."""
        lists = list_column(batch, "candidates", values=self.item_type, first_row=first_row)
        if lists.is_null.any():
            row = first_row + int(np.flatnonzero(lists.is_null)[0])
            raise RequestError(f"row {row}: column 'candidates' is null: give a list, which may be empty")
        return lists.offsets, self.rows(lists.values)

    def rows(self, raw_ids: pa.Array) -> np.ndarray:
        """int64 table rows of raw item ids, UNKNOWN_ROW for an id, or null, that is not in the model."""
        encoded = raw_ids.dictionary_encode()
        places = self._index.get_indexer(pd.Index(encoded.dictionary.to_numpy(zero_copy_only=False)))
        row = np.where(places < 0, UNKNOWN_ROW, places + self.settings["first_item_row"]).astype(np.int64)
        return _decoded(row, encoded, UNKNOWN_ROW)

    def codes(self, actions: pa.Array) -> np.ndarray:
        """int64 codes of action names, 0 for a name, or null, that is not in the model."""
        encoded = actions.dictionary_encode()
        code = [self._code_of_action.get(name, 0) for name in encoded.dictionary.to_pylist()]
        return _decoded(np.array(code, np.int64), encoded, 0)

    def shown(self, histories: Histories, time: np.ndarray) -> tuple[Histories, np.ndarray]:
        """What the tower sees of the histories: (those events, each request's time [B]) for asked times [B]."""
        earlier = histories.before(time) if (time < NO_TIME).any() else histories
        shown = earlier.latest(self.settings["max_history"])
        last = np.concatenate([shown.time, [0]])[np.where(shown.lengths > 0, shown.offsets[1:] - 1, len(shown.time))]
        return shown, np.where(time < NO_TIME, time, last)

    def logits(self, shown: Histories, time: np.ndarray, offsets: np.ndarray, row: np.ndarray) -> np.ndarray:
        """[M] float32: a logit per candidate; request b has the candidates row[offsets[b] : offsets[b + 1]]."""
        together = self.settings["model"].get("set_attention", False)
        request, start, size = _pieces(offsets, most=None if together else FORWARD_ENTRIES)
        cost = np.cumsum(shown.lengths[request] + size + REQUEST_ENTRIES)
        bounds = [0]
        while bounds[-1] < len(request):
            done = cost[bounds[-1] - 1] if bounds[-1] else 0
            bounds.append(max(bounds[-1] + 1, int(np.searchsorted(cost, done + FORWARD_ENTRIES, side="right"))))
        parts = [np.zeros(0, np.float32)]
        for first, last in itertools.pairwise(bounds):
            asked = request[first:last]
            entries = row[start[first] : start[last - 1] + size[last - 1]]
            parts.append(self._forward(shown.take(asked), time[asked], flat_offsets(size[first:last]), entries))
        return np.concatenate(parts)

    def _forward(self, shown: Histories, time: np.ndarray, offsets: np.ndarray, row: np.ndarray) -> np.ndarray:
        item, index = torch.from_numpy(np.concatenate([shown.row, row])), None
        if len(item) < len(self.item_IC):
            item, index = torch.unique(item, return_inverse=True)
        # Of the whole table or of its distinct rows, which ascend.
        first_item_row = self.settings["first_item_row"]
        num_reserved = first_item_row if index is None else int((item < first_item_row).sum())
        with torch.inference_mode():
            # More entries than items: the whole table is the cheaper look-up.
            inputs = ModelInput(
                item_IC=self.item_IC if index is None else self.item_IC[item],
                features_IFC=self.features_IFC if index is None else self.features_IFC[item],
                user_features_UGC=user_vectors(self.user_tables, shown.users, num_users=len(time), like=self.item_IC),
                event_offsets_U1=torch.from_numpy(shown.offsets),
                event_item_N=(item if index is None else index)[: len(shown.row)],
                event_time_N=torch.from_numpy(shown.time),
                event_action_N=torch.from_numpy(shown.action),
                request_user_B=torch.arange(len(time)),
                request_position_B=torch.from_numpy(shown.lengths),
                request_time_B=torch.from_numpy(time),
                candidate_offsets_B1=torch.from_numpy(offsets),
                candidate_item_M=(item if index is None else index)[len(shown.row) :],
                num_reserved=num_reserved,
            )
            return self.tower(inputs).numpy()


def build_scorer_tower(settings: dict[str, Any], *, num_features: int) -> Recommender:
    """The tower whose classes stand above in the exported file; inside the repository, models/."""
    config = SolarConfig(**{key: settings[key] for key in settings if key != "name"})
    return Solar(config, num_features=num_features)


def _mean_rows(weight: Tensor, values: list[list[int]], first_item_row: int, *, width: int) -> Tensor:
    """[item rows, C]: the mean of each item's feature rows; zero for items without any (padding and unknown too), and
    in the last columns where the feature's table is narrower than C = `width`."""
    lengths = torch.tensor([0] * first_item_row + [len(value) for value in values])
    flat = torch.tensor([row for value in values for row in value], dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    total = torch.zeros(len(lengths), width)
    total[:, : weight.shape[1]].index_add_(0, owner, weight[flat])
    return total / lengths.clamp(min=1).unsqueeze(1)


def user_vectors(tables: list[Tensor], users: tuple[UserFeature, ...], *, num_users: int, like: Tensor) -> Tensor:
    """user_features_UGC: the mean row of each feature's values, zero where there are none."""
    found = like.new_zeros(num_users, len(tables), like.shape[1])
    for place, (table, feature) in enumerate(zip(tables, users, strict=True)):
        lengths = torch.from_numpy(feature.lengths)
        owner = torch.repeat_interleave(torch.arange(num_users), lengths)
        total = like.new_zeros(num_users, table.shape[1]).index_add(0, owner, table[torch.from_numpy(feature.row)])
        found[:, place, : table.shape[1]] = total / lengths.clamp(min=1).unsqueeze(1)
    return found


def _arrow(frame: pd.DataFrame, user_features: list[str]) -> pa.RecordBatch:
    """The columns that a scorer reads, whatever their cells are (lists, arrays, None)."""
    known = ("history", "candidates", "history_time", "history_action", "time", *user_features)
    columns = {}
    for name in (name for name in known if name in frame):
        # pandas makes floats of integers beside a missing one.
        column = frame[name].convert_dtypes() if name == "time" or name in user_features else frame[name]
        try:
            columns[name] = pa.array(column, from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise RequestError(f"column {name!r} mixes types: {error}") from error
    if not columns:
        raise RequestError(f"column 'history' is missing: the frame has {list(frame.columns)}")
    return pa.RecordBatch.from_pydict(columns)


def _pieces(offsets: np.ndarray, *, most: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(request, first candidate, number of candidates) of runs of at most `most` candidates of one request."""
    sizes = np.diff(offsets)
    most = int(sizes.max(initial=1)) if most is None else most
    counts = -(-sizes // most)
    request = np.repeat(np.arange(len(sizes)), counts)
    start = offsets[request] + most * flat_ranges(np.zeros_like(counts), counts)
    return request, start, np.minimum(offsets[request + 1] - start, most)


def _decoded(value_of_code: np.ndarray, encoded: Any, of_null: int) -> np.ndarray:
    """The values behind the indices of a dictionary array."""
    codes = np.asarray(encoded.indices.fill_null(len(value_of_code)))
    return np.append(value_of_code, np.int64(of_null))[codes]

import mlflow  # noqa: E402

mlflow.models.set_model(Scorer())

"""Sequence models: a request is a vector, a candidate is a vector; their inner product is the logit [+ repeat + level].

    user's events       a b c d e f g h | i j          max_length = 4, requests after c, f and h

    causal, training    [a b c]   [e f g h]            windows end at the user's last request; f reads e f
    causal, evaluation  [a b c]   [c d e f] [e f g h]  every request reads exactly its latest max_length events
    published           [a b c .] [c d e f] [e f g h]  the same, in training too; padded on the right to max_length

The field's models (recgrela.py, sasrec.py, hstu.py, gru4rec.py, linrec.py, light_sans_sequence.py) differ only in
`encode`. A causal model runs once per window and serves all requests in it. In training a request reads between 1 and
max_length of its latest events, so that all positions of a user cost one pass; in evaluation it reads all max_length,
and its score does not depend on the rest of the batch. (Requests among a user's first max_length events share a window
in evaluation too.) Later events do not change earlier states, so padding on the right has no effect. A published form
that is not causal runs once per prefix.
The letters are those of models/interface.py; K counts windows, T their positions.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.candidate_sets import gather_rows
from models.interface import ModelInput, Recommender
from models.repeats import LearnedNumber, repeats
from models.sequence_settings import SelfAttentionConfig, SequenceConfig

PADDING_SEED = 20_250_613
"""Fixed, so that all ranks draw the same padding vector: it is not trained, so no optimizer keeps it equal."""
INITIAL_STD = 0.02
"""Initial standard deviation of linear maps, positions and padding, as in most public code of the field."""


class Vectors(NamedTuple):
    """What logits are made of, in float32: a logit is the inner product of a state and a vector, plus repeat_1 if the
    candidate occurs in the history, plus level_1. (A tuple: DeepSpeed looks for tensors in what an engine returns.)"""

    state_BD: Tensor
    vector_ID: Tensor
    repeat_1: Tensor | None
    level_1: Tensor | None


class SequenceModel(Recommender):
    """A tower whose requests are vectors. `num_features` is F; subclasses define in `encode` how events are read.

    An empty history is a window with one padding vector: its state is defined, and all parameters learn from it. The
    padding vector is drawn like a row of the table and never changes. (Public code of the published forms reads the
    table's padding row, which no look-up trains; with a full softmax it may move.)
    """

    causal = True
    """Whether a state depends only on the events up to its own. If not, every prefix has its own window of max_length.
    """

    def __init__(self, config: SequenceConfig, *, num_features: int = 0) -> None:
        super().__init__()
        self.shared = config
        if config.item_features and not num_features:
            raise ValueError("item_features = true but the items have no features; set it to false")
        generator = torch.Generator().manual_seed(PADDING_SEED)
        self.padding_D: Tensor
        drawn_D = torch.randn(config.width, generator=generator) * INITIAL_STD
        self.register_buffer("padding_D", drawn_D, persistent=False)
        self.repeat = LearnedNumber() if config.repeats else None
        self.level = None if config.initial_logit is None else LearnedNumber(config.initial_logit)

    def item_vectors(self, inputs: ModelInput) -> Tensor:
        """vector_ID: the item vectors that both events and candidates use."""
        vector_ID = inputs.item_IC
        if self.shared.item_features:
            vector_ID = vector_ID + inputs.features_IFC.sum(1)
        return vector_ID.to(self.padding_D.dtype)

    def request_states(self, inputs: ModelInput, vector_ID: Tensor) -> Tensor:
        """state_BD: the state of each request's user after the first request_position_B of the events."""
        windows = self.windows(inputs)
        blocks = windows.in_blocks(self.shared.max_length) if self.causal else [windows]
        state_BD = torch.cat([self._states_of(block, inputs, vector_ID) for block in blocks])
        # The states are in the order of the blocks: put them back into the order of the requests.
        place_B = torch.cat([block.request_B for block in blocks]).argsort()
        return gather_rows(state_BD, place_B.to(vector_ID.device, non_blocking=True))

    def _states_of(self, windows: Windows, inputs: ModelInput, vector_ID: Tensor) -> Tensor:
        state_KTD = self.encode(windows.events(inputs, vector_ID, self.padding_D), windows=windows, inputs=inputs)
        return gather_rows(state_KTD.flatten(0, 1), windows.place_B.to(vector_ID.device, non_blocking=True))

    def windows(self, inputs: ModelInput) -> Windows:
        """The windows in which this model reads the histories of these requests."""
        length = self.shared.max_length
        return Windows.of_requests(
            inputs,
            max_length=length,
            shared=self.causal and self.training,
            shifted=self.shared.shift_windows,
            num_positions=None if self.causal else length,
        )

    def encode(self, vector_KTD: Tensor, *, windows: Windows, inputs: ModelInput) -> Tensor:
        """state_KTD: the state at every position of every window."""
        raise NotImplementedError

    @overload
    def forward(self, inputs: ModelInput) -> Tensor: ...

    @overload
    def forward(self, inputs: ModelInput, *, vectors: Literal[True]) -> Vectors: ...

    def forward(self, inputs: ModelInput, *, vectors: bool = False) -> Tensor | Vectors:
        """logits_M; with `vectors` what they are made of."""
        vector_ID = self.item_vectors(inputs)
        state_BD = self.request_states(inputs, vector_ID)
        repeat_1 = None if self.repeat is None else self.repeat()
        level_1 = None if self.level is None else self.level()
        if vectors:
            return Vectors(state_BD=state_BD.float(), vector_ID=vector_ID.float(), repeat_1=repeat_1, level_1=level_1)
        request_M = torch.repeat_interleave(inputs.candidate_offsets_B1.diff()).to(vector_ID.device, non_blocking=True)
        state_MD = gather_rows(state_BD, request_M)
        candidate_MD = gather_rows(vector_ID, inputs.candidate_item_M)
        precision = torch.promote_types(vector_ID.dtype, torch.float32)
        logit_M = (state_MD.to(precision) * candidate_MD.to(precision)).sum(-1).float()
        if repeat_1 is not None:
            found_M1 = repeats(inputs, request_M=request_M, windows=(None,), time_features=False)[:, :1]
            logit_M = logit_M + torch.where(found_M1 > 0, repeat_1, 0).squeeze(1)
        return logit_M if level_1 is None else logit_M + level_1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """Runs of events that a model reads at once, on the host. There is always at least one window with one position."""

    event_KT: Tensor
    """[K, T] int64: 1 + row of the event in N; 0 = padding, which follows all events of the window."""
    request_B: Tensor
    """[B] int64: the requests that are served, ascending: all of a batch, or those of a block."""
    place_B: Tensor
    """[B] int64: the position in K x T of each request's state: its last event, or a padding if it has no events."""

    @staticmethod
    def of_requests(
        inputs: ModelInput, *, max_length: int, shared: bool, shifted: bool = False, num_positions: int | None = None
    ) -> Windows:
        """Windows of at most `max_length` events, padded to `num_positions` or to the length of the longest window.

        shared: a user's windows are laid end to end backwards from the user's last request, and a request reads its
        window up to its own position: 1 to max_length events. Otherwise each request reads its latest max_length
        events. With `num_positions`, requests with different positions never share a window.
        """
        # Find the first event of each request's window.
        user_B, position_B = inputs.request_user_B, inputs.request_position_B
        if shared:
            last_U = torch.zeros_like(inputs.event_offsets_U1[1:]).scatter_reduce(0, user_B, position_B, "amax")
            if shifted:
                last_U = torch.where(last_U > max_length, last_U + torch.randint(max_length, last_U.shape), last_U)
            last_B = last_U[user_B]
            start_B = last_B - ((last_B - position_B) // max_length + 1) * max_length
        else:
            start_B = position_B - max_length
        start_B = start_B.clamp_min(0)
        own_B = start_B if num_positions is None else position_B
        stride = int(position_B.max()) + 1 if position_B.numel() else 1
        # Give each distinct window a row. Requests with an empty history share a window of padding.
        key_B = torch.where(position_B > 0, user_B * stride + own_B, -1)
        key_K, window_B = torch.unique(key_B, return_inverse=True)
        start_K, stop_K = (
            torch.zeros_like(key_K).scatter_reduce(0, window_B, value_B, "amax") for value_B in (start_B, position_B)
        )
        first_K = inputs.event_offsets_U1[(key_K // stride).clamp_min(0)] + start_K
        # A rank without requests also runs the model, on one window of padding.
        first_K, length_K = (F.pad(value, (0, int(not key_K.numel()))) for value in (first_K, stop_K - start_K))
        width = max(1, int(length_K.max())) if num_positions is None else num_positions
        place_T = torch.arange(width)
        return Windows(
            event_KT=torch.where(place_T < length_K[:, None], first_K[:, None] + place_T + 1, 0),
            request_B=torch.arange(len(position_B)),
            place_B=window_B * width + (position_B - start_B - 1).clamp_min(0),
        )

    def in_blocks(self, max_length: int) -> list[Windows]:
        """These windows in three blocks by length, so that short ones are not padded to the longest: up to a quarter of
        `max_length`, up to half, above half (MovieLens-1M, windows of 200: 1.2 positions per event instead of 1.7).

        There are always three blocks, an empty one has a window of padding: under ZeRO-3 every forward is a collective.
        """
        num_positions = self.event_KT.shape[1]
        length_K, window_B = (self.event_KT > 0).sum(1), self.place_B // num_positions
        block_K = torch.bucketize(length_K, torch.tensor([-(-max_length // 4), -(-max_length // 2)]))
        return [self._only(block_K == block, length_K, window_B) for block in range(3)]

    def _only(self, kept_K: Tensor, length_K: Tensor, window_B: Tensor) -> Windows:
        width = max(1, int(length_K[kept_K].max())) if kept_K.any() else 1
        event_KT = self.event_KT[kept_K, :width]
        served_B = kept_K[window_B]
        place_B = (kept_K.cumsum(0) - 1)[window_B] * width + self.place_B % self.event_KT.shape[1]
        return Windows(
            event_KT=event_KT if len(event_KT) else self.event_KT.new_zeros(1, 1),
            request_B=self.request_B[served_B],
            place_B=place_B[served_B],
        )

    def events(self, inputs: ModelInput, vector_ID: Tensor, padding_D: Tensor) -> Tensor:
        """vector_KTD: the vectors of the windows' events."""
        event_KT = self.event_KT.to(inputs.event_item_N.device, non_blocking=True)
        item_N1 = F.pad(inputs.event_item_N + 1, (1, 0))
        return gather_rows(torch.cat([padding_D[None], vector_ID]), item_N1[event_KT])

    def times(self, inputs: ModelInput) -> Tensor:
        """time_KT: [K, T] int64 milliseconds; 0 for padding."""
        event_KT = self.event_KT.to(inputs.event_time_N.device, non_blocking=True)
        return F.pad(inputs.event_time_N, (1, 0))[event_KT]


class Positions(nn.Module):
    """position_TD: a learned vector for each of the first T positions of a window."""

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__()
        self.table_LD = nn.Parameter(torch.randn(config.max_length, config.width) * INITIAL_STD)

    def forward(self, num_positions: int) -> Tensor:
        return self.table_LD[:num_positions]


def draw_weights(module: nn.Module) -> None:
    """Initialise linear maps to N(0, 0.02) and biases to 0, as public code of the field does. For `module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INITIAL_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class FeedForward(nn.Module):
    """dropout(W_2 dropout(act(W_1 x))); both maps have a bias."""

    def __init__(self, width: int, *, hidden: int, activation: nn.Module, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation, self.dropout = activation, nn.Dropout(dropout)

    def forward(self, value: Tensor) -> Tensor:
        return self.dropout(self.second(self.dropout(self.activation(self.first(value)))))


class TransformerLayer(nn.Module):
    """The part of a layer after its attention: x = LN(x + dropout(W_O found + b_O)); LN(x + MLP(x)), 4 D, GELU.

    Subclasses compute `found`, the output of their attention, and call `finish`.
    """

    def __init__(self, config: SelfAttentionConfig, *, norm_eps: float) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.output, self.dropout = nn.Linear(width, width), nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = FeedForward(width, hidden=4 * width, activation=nn.GELU(), dropout=config.dropout)
        self.mlp_norm = nn.LayerNorm(width, eps=norm_eps)

    def finish(self, state_KTD: Tensor, found_KTD: Tensor) -> Tensor:
        """state_KTD after the layer, from its input and the output of its attention."""
        state_KTD = self.norm(state_KTD + self.dropout(self.output(found_KTD)))
        return self.mlp_norm(state_KTD + self.mlp(state_KTD))

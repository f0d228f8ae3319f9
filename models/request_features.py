"""Request features: features of the user, and the time of the request.

    request_BD = LayerNorm(W [mean vector of each user feature] + hour of day + weekday + W [time])

This vector shifts the query and the state of every candidate of the request. Added to the score itself, it would be the
same for all candidates and could not change their ranking; the shifted query and state interact with each candidate's
item and with the history.
The letters are those of models/interface.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.candidate_sets import gather_rows
from models.history import MS_PER_HOUR, WAVE_DAYS, time_waves
from models.interface import ModelInput


class RequestEncoder(nn.Module):
    """request_BD of every request. Unknown parts of the sum are zero: hour, weekday and waves of a request without a
    time (0), and the features of a user without values."""

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
        # Start without a shift; training learns it where it helps.
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.state.weight)

    def forward(self, request_BD: Tensor, *, request_M: Tensor) -> tuple[Tensor, Tensor]:
        return gather_rows(self.query(request_BD), request_M), gather_rows(self.state(request_BD), request_M)

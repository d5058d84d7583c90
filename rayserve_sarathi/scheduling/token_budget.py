"""`token_budget: auto`: how many tokens of prompts the next step has room for.

With a target for the time between tokens, the most with which every decode is expected to have its next token within
the target of its last one, as the paper counts it: every gap between two tokens of a request. Deadlines per request and
a prediction per step instead of one number for all is the idea of QoServe and FairBatching. But no more than use the
device well: beyond that, decodes would only wait longer, and hold their KV blocks and their places longer.

Without a target, the knee of the step-time curve (Sarathi-Serve, OSDI'24, section 4.3).
"""

import logging
import math
from collections.abc import Sequence

from rayserve_sarathi.config import SloConfig
from rayserve_sarathi.request import Request
from rayserve_sarathi.scheduling.forecast import StepForecast
from rayserve_sarathi.scheduling.step_time import TILE, StepLoad, attention_work

logger = logging.getLogger(__name__)

LONG_PROMPT_BUDGETS = 8
"""A prompt that fills more than so many steps leaves a share to the prompts behind it."""
LONG_PROMPT_SHARE = 0.75
_IDLE_TARGETS = 4.0
"""A step without decodes may take so many times the target: no token is late, but who arrives waits for it."""
_GOOD_SPEED = 0.95
"""A step is large enough if it computes this share of the tokens a second that any within the target would."""
_LOOK_AHEAD_TILES = 2
"""So many tiles more may take less time than these."""
_CROWDED_STEPS = 8
"""Where the decodes alone exceed the target, one step in so many computes a tile of a prompt."""
_EVENNESS = 1.5
"""How many times as long as the steps before it a step of a pipeline may be, beyond what uses the device well."""
_LONGEST_EVEN = 16 * TILE
"""So many tokens of prompts use any device well: to look at more sizes takes longer than all the rest of a choice."""
_MEAN_STEPS = 16

_Candidate = tuple[int, int]
"""Tokens that a prompt lacks, and those it has."""


class AutoBudget:
    """Chooses the budget of each step.

    Args:
        forecast: What steps take; its owner keeps it up to date.
        slo: The target.
        max_tokens: Most tokens in a step.
        max_steps_in_flight: Steps that take turns: all of them pass between two tokens of a request.
    """

    def __init__(self, forecast: StepForecast, slo: SloConfig, *, max_tokens: int, max_steps_in_flight: int) -> None:
        self._forecast = forecast
        self._tbt_s = slo.tbt_s
        self._max_tokens = max_tokens
        self._max_steps_in_flight = max_steps_in_flight
        # Rare enough that such steps do not spoil the quantile.
        self._patience = math.ceil(2 / (1 - slo.quantile))
        self._num_without_room = 0
        self._is_reported = False
        self._mean_tokens = float(max_tokens)

    @property
    def mean_tokens(self) -> int:
        """The budget, averaged over the last steps that could take tokens of a prompt."""
        return max(round(self._mean_tokens), 1)

    def room(
        self,
        decodes: Sequence[Request],
        prompts: Sequence[Request],
        *,
        now_s: float,
        is_decoding: bool,
    ) -> int:
        """Return how many tokens of prompts the next step has room for beside `decodes`.

        Args:
            decodes: Those of the step.
            prompts: Those that will get the room, first one first.
            now_s: The time.
            is_decoding: Whether any request generates tokens, in the step or in another one in flight.
        """
        num_decodes = len(decodes)
        context_tokens = sum([request.num_computed_tokens for request in decodes])
        load = StepLoad(num_decodes, num_decodes, context_tokens, 0.0)
        most = max(self._max_tokens - num_decodes, 0)
        if self._tbt_s is None:
            room = min(max(self._knee_tokens() - num_decodes, TILE), most)
        else:
            limit_s = self._limit_s(decodes, load, self._tbt_s, now_s=now_s, is_decoding=is_decoding)
            if self._forecast.num_stages > 1:
                limit_s = min(limit_s, self._even_s(load, most))
            candidates = [
                (request.num_tokens - request.num_scheduled_tokens, request.num_scheduled_tokens) for request in prompts
            ]
            room = self._largest(load, candidates, limit_s, most)
            room = self._well_used(room, num_decodes) if is_decoding else self._in_tiles(room, num_decodes)
            room = self._keep_moving(room, load, most, self._tbt_s)
        self._mean_tokens += (num_decodes + room - self._mean_tokens) / _MEAN_STEPS
        return room

    def _limit_s(
        self, decodes: Sequence[Request], load: StepLoad, tbt_s: float, *, now_s: float, is_decoding: bool
    ) -> float:
        """Return how long the step may keep its slowest stage."""
        forecast = self._forecast
        share_s = tbt_s / self._max_steps_in_flight / forecast.margin
        if not is_decoding:
            return share_s * _IDLE_TARGETS
        if not decodes:
            return share_s
        alone_s = forecast.step_time.predict_s(load)
        # The earliest that can be met: a token that is late whatever the step holds is no reason to hold up prompts.
        free_s = forecast.free_s(now_s)  # when those in flight, whose next token is on its way, will have it
        lasts_s = {free_s if request.num_in_flight_tokens else request.last_token_s or now_s for request in decodes}
        for last_s in sorted(lasts_s):
            longest_s = forecast.longest_period_s(now_s, deadline_s=last_s + tbt_s)
            if longest_s >= alone_s:
                return min(share_s, longest_s)
        return share_s

    def _even_s(self, load: StepLoad, most: int) -> float:
        """Return how long a step of a pipeline may be so that the stages behind it need not wait for it.

        A step much longer than the others passes the stages one after another while these have nothing to do: steps of
        equal length make no bubbles (section 5.3 of the paper). But a device that is used badly loses more than that.
        """
        num_tokens = load.num_decodes + self._well_used(min(most, _LONGEST_EVEN), load.num_decodes)
        well_used_s = self._forecast.step_time.predict_s(load._replace(num_tokens=num_tokens))
        return max(well_used_s, _EVENNESS * self._forecast.mean_period_s)

    def _largest(self, load: StepLoad, candidates: Sequence[_Candidate], limit_s: float, most: int) -> int:
        """Return the most tokens of `candidates`, one after another, with which a step takes `limit_s` or less."""
        predict_s = self._forecast.step_time.predict_s
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if predict_s(_with_chunks(load, candidates, middle)) <= limit_s:
                low = middle
            else:
                high = middle - 1
        whole = self._in_tiles(low, load.num_tokens)
        for more in range(TILE, (_LOOK_AHEAD_TILES + 1) * TILE, TILE):
            if whole + more <= most and predict_s(_with_chunks(load, candidates, whole + more)) <= limit_s:
                low = whole + more
        return low

    def _in_tiles(self, room: int, num_decodes: int) -> int:
        """Round the whole step down to tiles, if a tile or more is left of the room."""
        rounded = (num_decodes + room) // TILE * TILE - num_decodes
        return rounded if rounded > 0 else room

    def _well_used(self, room: int, num_decodes: int) -> int:
        """Return the least room, no more than `room` and the whole step in tiles, with which the device is used well.

        Measured by the linear layers alone: the longer steps are, the more decodes run at once, so larger steps do not
        save any of the decodes' own time.
        """
        fewest, most = -(-(num_decodes + TILE // 2) // TILE), (num_decodes + room) // TILE
        if fewest >= most:
            return self._in_tiles(room, num_decodes)
        predict_s = self._forecast.step_time.predict_s
        speeds = [tiles / predict_s(StepLoad(tiles * TILE, 0, 0, 0.0)) for tiles in range(fewest, most + 1)]
        good = _GOOD_SPEED * max(speeds)
        tiles = next(tiles for tiles, speed in enumerate(speeds, fewest) if speed >= good)
        return tiles * TILE - num_decodes

    def _keep_moving(self, room: int, load: StepLoad, most: int, tbt_s: float) -> int:
        """Return `room`, or a little more where prompts have had none for long."""
        if room or not most:
            self._num_without_room = 0
            return room
        if not load.num_decodes:
            # With nothing in flight there would be no step at all, and nothing that leads to one.
            return 0 if self._forecast.num_in_flight else min(TILE, most)
        self._num_without_room += 1
        alone_s = self._forecast.step_time.predict_s(load) * self._max_steps_in_flight
        is_crowded = alone_s > tbt_s
        if is_crowded and not self._is_reported and self._forecast.is_settled:
            self._is_reported = True
            logger.warning(
                "slo.tbt_s=%g cannot be kept: %d decodes with %d tokens of context take %.3g s by themselves; use a"
                " longer target, a smaller max_num_seqs, or more or faster devices",
                tbt_s,
                load.num_decodes,
                load.context_tokens,
                alone_s,
            )
        if self._num_without_room < (_CROWDED_STEPS if is_crowded else self._patience):
            return 0
        self._num_without_room = 0
        return min(TILE, most)

    def _knee_tokens(self) -> int:
        knee = min(self._forecast.step_time.knee, float(self._max_tokens))
        return max(math.ceil(knee / TILE), 1) * TILE


def _with_chunks(load: StepLoad, candidates: Sequence[_Candidate], num_tokens: int) -> StepLoad:
    """Return a step of decodes with `num_tokens` of prompts added; those beyond the candidates' are of new ones."""
    context_tokens, work, left = load.context_tokens, 0.0, num_tokens
    for num_lacking, context_len in candidates:
        query_len = min(num_lacking, left)
        context_tokens += context_len
        work += attention_work(query_len, context_len)
        left -= query_len
        if not left:
            break
    work += attention_work(left, 0)
    return StepLoad(load.num_tokens + num_tokens, load.num_decodes, context_tokens, work)

"""Do compiled models pick the tokens that the eager one picks?"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_model import Model

Tensor = torch.Tensor
STEPS = 64


class Agreement:
    """Greedy decoding of one model and batch: eager's tokens and logits, and who follows them."""

    def __init__(self, model: Model, batch: int) -> None:
        self.model, self.batch = model, batch
        self.device = model.lm_head.weight.device
        torch.manual_seed(2)
        self.start = torch.randint(model.s.vocab, (batch,), device=self.device)
        self.tokens: list[Tensor] = []
        self.logits: list[Tensor] = []

    def _run(self, call: Callable[..., Tensor], fed: list[Tensor] | None) -> list[Tensor]:
        """Logits of each step; fed with tokens, or with its own."""
        caches, token, found = self.model.caches(self.batch), self.start, []
        for step in range(STEPS):
            at = torch.tensor([step], device=self.device)
            # A copy: compiled code is bound to the strides it was timed with.
            found.append(call(token.clone()[:, None], at, caches).clone())
            token = found[-1].argmax(-1) if fed is None else fed[step]
        return found

    def of(self, call: Callable[..., Tensor]) -> dict[str, Any]:
        """The row's entries; the first call must be eager's."""
        if not self.logits:
            self.logits = self._run(call, None)
            self.tokens = [logits.argmax(-1) for logits in self.logits]
        agree, bits = [], []
        for mine, logits, token in zip(
            self._run(call, self.tokens), self.logits, self.tokens, strict=True
        ):
            agree.append((mine.argmax(-1) == token).float().mean().item())
            bits.append((mine == logits).float().mean().item())
        free = self._run(call, None)
        left = [
            step
            for step, (mine, token) in enumerate(zip(free, self.tokens, strict=True))
            if bool((mine.argmax(-1) != token).any())
        ]
        return {
            "agree": round(statistics.fmean(agree), 5),
            "bits": round(statistics.fmean(bits), 5),
            "first": left[0] if left else None,
        }

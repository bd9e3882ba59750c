"""What computing would take on an accelerator: a model of it, by which processes sleep.

**Prefill** of n tokens behind c that are cached: 2 P n + 4 L H (n c + n (n + 1) / 2) floating-point operations, at a steady rate,
of P parameters, L layers and hidden size H: a third of the 6 P + 12 L H T for each token and T tokens of context that appendix B of
PaLM (Chowdhery et al., arXiv:2204.02311) counts for forward and backward together, attention causal here. Layers take equal parts.

**A decode step** of b requests with t tokens of context in all: the longer of reading the weights and the requests' KV cache once,
and of 2 P b operations (Pope et al., Efficiently Scaling Transformer Inference, arXiv:2211.05102, section 2).

P is 12 L H² (Kaplan et al., arXiv:2001.08361, section 2.1) unless it is given; of a mixture of experts it stands for the active
ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from nixl_async.benchmarks.kv.layouts import dtype_nbytes
from nixl_async.benchmarks.kv.models import Model
from nixl_async.errors import ConfigurationError

_TERA, _GIGA = 1e12, 1e9
_WEIGHT_DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True)
class Compute:
    """An accelerator with a model on it. Rates are what is reached, not what a data sheet has; bytes, seconds."""

    layers: int
    hidden: int
    parameters: float
    weight_nbytes: float
    """Bytes of all parameters."""
    token_nbytes: int
    """Bytes of a token's KV cache."""
    flops: float
    """Floating-point operations a second."""
    bandwidth: float
    """Bytes of memory a second."""
    speed: float = 1.0
    """How many times as fast all of it is."""

    @classmethod
    def of(
        cls, model: Model, token_nbytes: int, *, tflops: float, gb_per_second: float, parameters: float, speed: float
    ) -> Compute:
        """Describe a model; `parameters`, in 10^9, are estimated where they are 0.

        Raises:
            ConfigurationError: the model's source does not say how large its hidden state is.
        """
        hidden = model.hidden_size
        if hidden is None:
            raise ConfigurationError(f"{model.source}: there is no 'hidden_size', by which computing is reckoned; add it")
        count = parameters * _GIGA or 12.0 * model.layers * hidden**2
        weights = count * dtype_nbytes(model.dtype or _WEIGHT_DTYPE)
        rates = {"flops": tflops * _TERA, "bandwidth": gb_per_second * _GIGA, "speed": speed}
        return cls(model.layers, hidden, count, weights, token_nbytes, **rates)

    def prefill_seconds(self, tokens: int, cached: int) -> float:
        """Return what computing `tokens` tokens takes, behind `cached` ones."""
        seen = tokens * cached + tokens * (tokens + 1) / 2
        return (2 * self.parameters * tokens + 4 * self.layers * self.hidden * seen) / self.flops / self.speed

    def step_seconds(self, requests: int, context: int) -> float:
        """Return what one more token for each of `requests` requests takes, with `context` tokens behind all of them together."""
        memory = (self.weight_nbytes + context * self.token_nbytes) / self.bandwidth
        return max(memory, 2 * self.parameters * requests / self.flops) / self.speed

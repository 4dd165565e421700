"""The contract that every attention keeps."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.common.dispatch import MAX_HEAD_DIM, check_impl, resolve_impl
from kernels.common.inputs import check_inputs, check_positive


class Attention(nn.Module):
    """Base of all attentions: holds the common arguments, validates a call, leaves autocast.

    out = module(q, k, v, key_mask=None)

    q, k, v    (B, H, N, D), one float dtype, any strides with a unit last stride
    key_mask   (B, N) bool, True = real token; None = all real
    out        (B, H, N, D), dtype of q, laid out in memory as (B, N, H, D); rows of padded queries are zero

    Padded keys never change a real token's output, whatever they hold, as long as products with it are finite. A
    sequence without any real token gives zeros and zero gradients. Every N with 1 <= N <= max_length works. A subclass
    implements `attend`, and sets `_auxiliary` there if it has a loss of its own.
    """

    implementations: tuple[str, ...] = ("reference",)
    """What `impl` may name; a method with kernels adds "triton"."""

    batch_independent_options: ClassVar[dict[str, Any]] = {}
    """Options under which, in evaluation, a sequence's output does not depend on its batch mates (nor, where causal,
    on later tokens); needed only by a method whose defaults pool statistics over the call."""

    selected: Tensor | None = None
    """What calls attend to instead of their own choice, as `select` gives it: set to compare implementations on one
    selection. Only the reference of a method that selects takes it."""

    def __init__(self, num_heads: int, head_dim: int, max_length: int, causal: bool = False, impl: str = "auto"):
        super().__init__()
        check_positive(num_heads=num_heads, head_dim=head_dim, max_length=max_length)
        check_impl(impl, self.implementations, type(self).__name__)
        self.num_heads, self.head_dim, self.max_length = num_heads, head_dim, max_length
        self.causal, self.impl = causal, impl
        self._auxiliary: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        check_inputs(q, k, v, key_mask, num_heads=self.num_heads, head_dim=self.head_dim, max_length=self.max_length)
        with torch.autocast(q.device.type, enabled=False):
            return self.attend(q, k, v, key_mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """The method itself, on validated inputs; must return what the class docstring promises."""
        raise NotImplementedError

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor | None:
        """What a call chooses to attend to, (…, m) ascending indices of candidates; None for a method without choice.

        Arguments as in a call, which may change the state that the choice depends on.
        """
        return None

    def preference(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """What `select` takes the m largest of, (…, candidates), scaled so that it spreads over about one."""
        raise NotImplementedError

    def auxiliary_loss(self) -> Tensor:
        """Scalar loss of the last call, already weighted; zero where the method has none."""
        return torch.zeros(()) if self._auxiliary is None else self._auxiliary

    def release(self) -> None:
        """Forget the loss of the last call, and with it the autograd graph that it keeps alive.

        A step that is to be captured in a CUDA graph must not meet the graph of an eager one.
        """
        self._auxiliary = None

    @property
    def ready(self) -> bool:
        """Whether a training call may be traced: False before what happens once, in a call that should stay eager."""
        return True

    def implementation(self, device: torch.device, compiled: bool = False) -> str:
        """Which implementation runs on `device`, in a model that is `compiled` or is not."""
        available = self.implementations if self.head_dim <= MAX_HEAD_DIM else ("reference",)
        return resolve_impl(self.impl, device, available)

    def __getstate__(self) -> dict[str, Any]:
        # The loss of the last call belongs to its graph: a copy or a pickle of the module starts without it.
        return {**super().__getstate__(), "_auxiliary": None}

    def diagnostics(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> dict[str, float]:
        """What only this method can tell about its treatment of q and k: numbers by name, averaged over heads.

        For a module in eval mode, with q, k, key_mask as in a call; of real tokens only, of which there is at least
        one. A method with something to tell overrides it (Routing: coverage; AdaMRA: queries per resolution; LLN: α
        and β); `scripts/lens.py` adds the numbers to its rows.
        """
        return {}

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}, impl={self.impl!r}"

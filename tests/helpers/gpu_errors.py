"""How far a GPU's own rounding may take each operator's results: ``GpuError`` counted through the kernels' formulas.

With e = exp(-|x|) to one special-function error, sigmoid(|x|) = 1 / (1 + e) and sigmoid(-|x|) = e / (1 + e) have two at
most, and softplus(-|x|) = log(1 + e), a polynomial of e, has one. Where the mask loss takes the unit's logarithm, that
has up to four for probabilities of 2/3 to 16/19, whose losses are small beside those of others, and else up to two. A
power has an error for each of its factors; as exp2(-gamma L), with L = -log of its base, it has gamma L from L's own.
What is added up has the largest of its terms.
"""

from __future__ import annotations

from fastmask.testing import GpuError

LARGEST_LOGIT = 24.0  # six standard deviations of what ``random_logits`` draws


def focal(gamma: float) -> float:
    """Of a pixel's loss, errors of (1 - p_t)^gamma (-log p_t); cross-entropy has fewer. A square is a product."""
    return 5.0 if gamma == 2.0 else 2.0 + gamma * LARGEST_LOGIT


def mask_loss(gamma: float = 2.0) -> tuple[GpuError, GpuError, GpuError]:
    """Of the losses by mask and by dice, and of their gradient.

    dice = 1 - (2 I + 1) / (P + A + 1), with 2 I <= P + A and both sums of probabilities: 4, of a quotient of up to one.
    A gradient's factors by dice are p (1 - p), 4, and a quotient by the square of such sums, 10; by mask, what
    ``focal`` has and 2 more. Pixels in the target and outside pull in opposite directions: twice that.
    """
    loss = focal(gamma)
    return GpuError(loss), GpuError(4, magnitude=1.0), GpuError(2 * max(14, loss + 2))


def mask_cost(cost_class: float, cost_mask: float, cost_dice: float, gamma: float = 2.0) -> GpuError:
    """At full pixels or at points. The cost is a difference: what its terms may be larger than it is the weights.

    The logarithm is the special-function unit's at full pixels: 2^-22 absolute, times a power that is less than one.
    Tensor cores add up 32 pixels, or points, in three parts, before the sums leave them, and dice has two such sums.
    """
    return GpuError(focal(gamma) + 2, 2 * 3 * 32, magnitude=cost_class + cost_mask + cost_dice)


def semantic(queries: int) -> GpuError:
    """softmax, 3; sigmoid, 2, with a power of two that scales it and is taken back. All queries are added up by tensor
    cores, in three parts."""
    return GpuError(8, 3 * (queries + 15))


def foreground_sum() -> GpuError:
    """A sum of sigmoids."""
    return GpuError(2)


def masked_attention(keys: int, head_dim: int, *, tensor_cores: bool) -> tuple[GpuError, ...]:
    """Of the output, and of the gradients of q, k and v, for inputs of about one.

    A weight has an exponential, a quotient and, where splits are put together, both again; each block of 32 keys may
    raise the maximum, and so rescale what was summed. For gradients a weight comes from the logarithm of its sum, of
    up to 9; and differences of two products are taken. Tensor cores, which float32 does without, add up the scores of
    ``head_dim`` products, in which an error is one of the weight too, and the keys.
    """
    functions = 6 + keys / 32
    products = keys + 2 * head_dim**1.5 if tensor_cores else 0.0
    return GpuError(functions, products, magnitude=4.0), *[GpuError(2 * (functions + 9), 2 * products)] * 3

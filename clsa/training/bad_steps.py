"""Steps whose loss or gradient is not finite: how to describe them, and when they end a run."""

from torch import Tensor, nn

from clsa.system.errors import ClsaError, Exit

IN_A_ROW = 25
# Until a good step, the weights are the initial ones, and skipping steps cannot help.
AT_THE_START = 5


def bad_gradients(module: nn.Module) -> list[str]:
    """Parameters whose gradient is not finite, from last to first: the order of backward."""
    graded = [(name, param.grad) for name, param in module.named_parameters()]
    bad = [name for name, grad in graded if grad is not None and not grad.isfinite().all()]
    return bad[::-1]


def describe_badness(module: nn.Module, loss: Tensor) -> str:
    """Say briefly what is not finite in this process: the loss, or which gradients."""
    bad = bad_gradients(module)
    if not loss.isfinite():
        return f"non-finite loss ({float(loss)})" + (f" and gradient in {bad[0]}" if bad else "")
    if not bad:
        return "the norm of the gradient overflows, or another process has a bad number"
    count = sum(param.grad is not None for param in module.parameters())
    return f"non-finite gradient in {bad[0]} ({len(bad)} of {count} parameters)"


def require_some_good(step: int, in_a_row: int, reason: str, kept: str) -> None:
    """End the run when skipping does not help.

    Args:
        step: steps done, including skipped ones.
        in_a_row: how many of the most recent steps were bad in a row.
        reason: what was bad in the last step.
        kept: file with the state before the first of these bad steps, or an empty string.

    Raises:
        ClsaError: 76 after `IN_A_ROW` bad steps, or after `AT_THE_START` at the run's beginning.
    """
    if in_a_row < (AT_THE_START if in_a_row == step else IN_A_ROW):
        return
    why = f"{in_a_row} bad steps in a row were skipped"
    hint = "in a new --out, lower --optim.lr, add --optim.warmup-epochs or --precision fp32"
    look = f"`clsa replay {kept}` shows the first; " if kept else ""
    raise ClsaError(f"{reason} at step {step - 1}", why, look + hint, Exit.UNHEALTHY)

"""Muon, batched over equal shapes: momentum orthogonalised by five Newton-Schulz steps, for matrices and convolutions.

PyTorch's own Muon takes 2-D parameters only and one at a time; here convolutions count as [out, in * kernel] and all
parameters of one shape share their matrix products, which is several times faster on small networks.
"""

import torch


class Muon(torch.optim.Optimizer):
    """W <- (1 - lr * decay) W - lr * sqrt(max(1, rows / columns)) * orthogonal(Nesterov momentum of the gradient)."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            momentum, by_shape = group["momentum"], {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter].setdefault("buffer", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - momentum)
                update = parameter.grad.lerp(buffer, momentum).reshape(parameter.shape[0], -1)
                by_shape.setdefault(update.shape, []).append((parameter, update))
            for (rows, columns), members in by_shape.items():
                updates = _orthogonal(torch.stack([update for _, update in members]))
                scale = group["lr"] * max(1, rows / columns) ** 0.5
                for (parameter, _), update in zip(members, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.reshape(parameter.shape), alpha=-scale)


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly the orthogonal factor of each matrix, `[n, rows, columns]`: singular values end in about 0.7..1.2."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.float().flatten(1).norm(dim=1)[:, None, None] + 1e-7).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()

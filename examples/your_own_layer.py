"""Add a recurrent layer of your own to the model: register it, check it, train it, generate with it.

    python examples/your_own_layer.py

The layer is minGRU (Feng et al. 2024, "Were RNNs All We Needed?"): one number a channel, and a gate that looks at the
input alone. What a layer owes the model is all here: a state that goes in and comes out, and a reset where a text
begins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.model import LAYER_TYPES, Gates, LayerState, ModelConfig, RecurrentLayer, RecurrentLM, detach_state

TEXT = "the cat sat on the mat, the dog sat on the log, and the cow looked at the moon. " * 40


class MinGRU(RecurrentLayer):
    """Minimal gated recurrent unit: h_t = (1 - z_t) h_(t-1) + z_t v_t, with z and v linear in the input.

    Args:
        dim: width of the model, D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, 2 * dim, bias=False)  # z, v
        self.output = nn.Linear(dim, dim, bias=False)

    def zero_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Return the inputs that a convolution would carry on (none here), and h [rows, D]."""
        width = self.output.in_features
        past = torch.zeros(rows, 0, width, device=device, dtype=dtype)
        return past, torch.zeros(rows, width, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: LayerState, reset_mask: Tensor | None = None) -> tuple[Tensor, LayerState]:
        """Read ``x`` [B, T, D] on from ``state``; h is zero before each token where ``reset_mask`` [B, T] is true."""
        past, h = state
        z, v = self.project(x).chunk(2, dim=-1)
        keep, write = 1 - z.sigmoid(), z.sigmoid() * v
        if reset_mask is not None:
            keep = keep.masked_fill(reset_mask.unsqueeze(-1), 0)
        steps = []
        for t in range(x.shape[1]):  # plain, token by token; a fast form would be tested against it
            h = keep[:, t] * h + write[:, t]
            steps.append(h)
        return self.output(torch.stack(steps, dim=1)), (past, h)

    def gates(self, x: Tensor) -> Gates:
        """Return the gate z and the decay 1 - z: training logs statistics of them."""
        z = self.project(x).chunk(2, dim=-1)[0].float()
        return Gates(F.logsigmoid(-z), {"z": z.sigmoid()})


LAYER_TYPES["mingru"] = lambda config: MinGRU(config.dim)
"""From here on a config may name it: beside "short" and "long", in any order."""


def check(net: RecurrentLM, tokens: Tensor) -> None:
    """Reading at once and in two parts comes to the same; after a reset nothing is left of what was before."""
    whole, _ = net(tokens, net.zero_state(len(tokens)))
    for cut in (1, 7, tokens.shape[1] - 1):
        first, state = net(tokens[:, :cut], net.zero_state(len(tokens)))
        second, _ = net(tokens[:, cut:], state)
        torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-4, atol=1e-5)
        reset_mask = torch.zeros_like(tokens, dtype=torch.bool)
        reset_mask[:, cut] = True
        alone, _ = net(tokens[:, cut:], net.zero_state(len(tokens)))
        after, _ = net(tokens, net.zero_state(len(tokens)), reset_mask)
        torch.testing.assert_close(after[:, cut:], alone, rtol=1e-4, atol=1e-5)


def train(net: RecurrentLM, tokens: Tensor, updates: int = 200, length: int = 64) -> float:
    """Train on one row of ``tokens`` [N], the state carried from update to update; return the last loss, in nats."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    state = net.zero_state(1)
    loss = torch.tensor(0.0)
    for update in range(updates):
        first = update * length % (len(tokens) - length - 1)
        part = tokens[first : first + length + 1]
        logits, state = net(part[None, :-1], detach_state(state))
        loss = F.cross_entropy(logits[0], part[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.inference_mode()
def generate(net: RecurrentLM, first: Tensor, length: int) -> list[int]:
    """Return ``length`` tokens that follow ``first`` [T], each the likeliest."""
    logits, state = net(first[None], net.zero_state(1))
    chosen = []
    for _ in range(length):
        chosen.append(int(logits[0, -1].argmax()))
        logits, state = net(torch.tensor([[chosen[-1]]]), state)
    return chosen


def main() -> None:
    torch.manual_seed(0)
    alphabet = sorted(set(TEXT))
    tokens = torch.tensor([alphabet.index(character) for character in TEXT])
    config = ModelConfig(dim=48, layers=3, layer_types=("mingru", "long", "mingru"), heads=2, ffn_dim=96)
    net = RecurrentLM(config, vocab_size=len(alphabet))
    check(net, tokens[:96].view(2, 48))
    print(f"{net.parameter_count():,} parameters; the layer is causal, carries its state and resets it")
    print(f"loss of the last update: {train(net, tokens):.3f} nats/character")
    written = generate(net, tokens[:16], 64)
    print(TEXT[:16] + "|" + "".join(alphabet[token] for token in written))


if __name__ == "__main__":
    main()

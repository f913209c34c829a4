"""The character LSTM of the FedAvg paper's Shakespeare task."""

from __future__ import annotations

from torch import Tensor, nn

from fedsim.errors import ModelError
from fedsim.models.shapes import whole


class CharacterLSTM(nn.Module):
    """Embedding, stacked LSTM, linear layer over the characters."""

    def __init__(self, characters: int, *, embedding: int, hidden: int, layers: int, last: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=layers, batch_first=True)
        self.head = nn.Linear(hidden, characters)
        self.last = last

    def forward(self, inputs: Tensor) -> Tensor:
        """int64 [B, T] -> [B, T, V], or [B, V] of the character after the last."""
        states, _ = self.lstm(self.embedding(inputs))
        logits: Tensor = self.head(states[:, -1] if self.last else states)
        return logits


def lstm(
    *,
    input_shape: tuple[int, ...],
    classes: int,
    embedding: int = 8,
    hidden: int = 256,
    layers: int = 2,
    last: bool = False,
) -> nn.Module:
    """A stacked character LSTM that predicts the next character at every position.

    McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized
    data", section 3 (embedding of 8, two layers of 256). `classes` is the vocabulary V.

    Args:
        embedding, hidden, layers: sizes.
        last: predict only the character after the window ([B, V], as LEAF does; for data loaded
            with ``target = "last"``).

    Departs from the paper: torch's LSTM has two bias vectors where the authors' has one, so it
    has 8 · `hidden` parameters more.
    """
    if len(input_shape) != 1:
        raise ModelError(
            "the model 'lstm' does not fit these data",
            code="FS-MOD-010",
            where="model.name",
            why=f"it takes sequences [T] of characters; the examples have {list(input_shape)}",
            hint="use a convolutional model for images, logistic or mlp for features",
        )
    for name, value in (("embedding", embedding), ("hidden", hidden), ("layers", layers)):
        whole("lstm", name, value)
    return CharacterLSTM(classes, embedding=embedding, hidden=hidden, layers=layers, last=last)

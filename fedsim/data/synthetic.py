"""The synthetic(α, β) data of the FedProx paper: how unlike the clients are is two numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fedsim.data import transforms
from fedsim.data.dataset import Dataset, Split, make_dataset
from fedsim.errors import ConfigError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def synthetic(
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    iid: bool = False,
    clients: int = 30,
    features: int = 60,
    classes: int = 10,
    examples: int | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Features and labels drawn from one softmax model per client; `owners` says whose is whose.

    Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith 2020, "Federated optimization in heterogeneous
    networks", section 5.1 and appendix C.1. For client k:

        u_k ~ N(0, α)         W_k[i, j] ~ N(u_k, 1),  b_k[j] ~ N(u_k, 1)
        B_k ~ N(0, β)         v_k[j] ~ N(B_k, 1)
        x ~ N(v_k, Σ),  Σ diagonal with Σ_jj = j^-1.2
        y = argmax(softmax(W_k x + b_k))

    As in the authors' generator, α and β are the *standard deviations* of u_k and B_k (for the
    settings 0 and 1 variance and deviation coincide), and sizes are ⌊lognormal(4, 2)⌋ + 50.

    Args:
        alpha: >= 0, how much the clients' models differ.
        beta: >= 0, how much their features differ.
        iid: one W, b with elements N(0, 1) for all clients and v = 0; `alpha`, `beta` are ignored.
        clients: N, number of clients; partition by ``natural`` to keep them.
        features: F, number of features.
        classes: K, number of classes.
        examples: of each client, training and test together; lognormal sizes when None.
        test_fraction: in [0, 1), share of each client's examples that goes to the central test set.
        seed: of the data; client k's data depend on `seed` and k alone.

    Raises:
        ConfigError: FS-DAT-011, a parameter out of range.
    """
    _check_parameters(
        alpha,
        beta,
        clients=clients,
        features=features,
        classes=classes,
        examples=examples,
        test_fraction=test_fraction,
    )
    deviation = np.arange(1, features + 1, dtype=np.float64) ** -0.6  # square root of j^-1.2
    shared = _stream(seed, clients)
    common = shared.standard_normal((features, classes)), shared.standard_normal(classes)
    train: list[tuple[Floats, Ints]] = []
    test: list[tuple[Floats, Ints]] = []
    for client in range(clients):
        draw = _stream(seed, client)
        count = int(draw.lognormal(4.0, 2.0)) + 50 if examples is None else examples
        weights, bias = common
        centre = np.zeros(features)
        if not iid:
            u_k = alpha * draw.standard_normal()
            weights = u_k + draw.standard_normal((features, classes))
            bias = u_k + draw.standard_normal(classes)
            centre = beta * draw.standard_normal() + draw.standard_normal(features)
        x = centre + deviation * draw.standard_normal((count, features))
        # Softmax keeps the order, so its argmax is that of the logits.
        y = (x @ weights + bias).argmax(axis=1).astype(np.int64)
        kept = count - int(count * test_fraction)
        train.append((x[:kept], y[:kept]))
        test.append((x[kept:], y[kept:]))
    sizes = [len(y) for _, y in train]
    return make_dataset(
        "synthetic",
        "classification",
        train=_joined(train),
        test=_joined(test) if sum(len(y) for _, y in test) else None,
        transforms=transforms.identity(),
        classes=classes,
        owners=np.repeat(np.arange(clients), sizes).astype(np.int64),
    )


def _stream(seed: int, client: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, client]))


def _joined(parts: list[tuple[Floats, Ints]]) -> Split:
    inputs = np.concatenate([x for x, _ in parts]).astype(np.float32)
    targets = np.concatenate([y for _, y in parts])
    return Split(torch.from_numpy(inputs), torch.from_numpy(targets))


def _check_parameters(
    alpha: float,
    beta: float,
    *,
    clients: int,
    features: int,
    classes: int,
    examples: int | None,
    test_fraction: float,
) -> None:
    wrong = {
        f"alpha = {alpha} is negative": alpha < 0,
        f"beta = {beta} is negative": beta < 0,
        f"clients = {clients} is less than 1": clients < 1,
        f"features = {features} is less than 1": features < 1,
        f"classes = {classes} is less than 2": classes < 2,
        f"examples = {examples} is less than 1": examples is not None and examples < 1,
        f"test_fraction = {test_fraction} is not in [0, 1)": not 0.0 <= test_fraction < 1.0,
    }
    for problem, applies in wrong.items():
        if applies:
            raise ConfigError(
                problem,
                code="FS-DAT-011",
                where="data",
                hint="fedsim plugins show synthetic lists parameters and ranges",
            )

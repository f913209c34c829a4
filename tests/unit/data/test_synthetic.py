from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedsim.data import Dataset
from fedsim.data.synthetic import synthetic
from fedsim.errors import ConfigError


def client_means(data: Dataset) -> np.ndarray:
    """[N, F] mean features of each client."""
    assert data.owners is not None
    inputs = data.train.inputs.double().numpy()
    return np.stack([inputs[data.owners == k].mean(axis=0) for k in range(data.owners.max() + 1)])


def test_shapes_owners_and_default_sizes() -> None:
    data = synthetic(seed=1)
    assert data.input_shape == (60,)
    assert data.classes == 10
    assert data.owners is not None
    assert np.bincount(data.owners).shape == (30,)
    # At least floor(lognormal) + 50 examples, a tenth of them for the test.
    assert np.bincount(data.owners).min() >= 45
    assert data.test is not None
    total = len(data.train) + len(data.test)
    assert len(data.test) / total == pytest.approx(0.1, abs=0.02)


def test_the_same_seed_gives_the_same_data_and_another_one_others() -> None:
    assert synthetic(seed=3, clients=4).digest == synthetic(seed=3, clients=4).digest
    assert synthetic(seed=4, clients=4).digest != synthetic(seed=3, clients=4).digest


def test_a_clients_data_do_not_depend_on_how_many_others_there_are() -> None:
    few, many = synthetic(clients=2, examples=20), synthetic(clients=9, examples=20)
    assert torch.equal(few.train.inputs, many.train.inputs[: len(few.train)])
    assert torch.equal(few.train.targets, many.train.targets[: len(few.train)])


def test_features_have_the_stated_covariance() -> None:
    data = synthetic(clients=1, examples=40_000, test_fraction=0.0)
    variance = data.train.inputs.double().var(dim=0).numpy()
    np.testing.assert_allclose(variance, np.arange(1, 61) ** -1.2, rtol=0.05)
    correlation = np.corrcoef(data.train.inputs.numpy().T)
    assert np.abs(correlation - np.eye(60)).max() < 0.03


def test_the_centres_of_clients_spread_by_1_plus_beta_squared() -> None:
    # v_k[j] = B_k + standard normal: across clients its variance is beta^2 + 1.
    for beta in (0.0, 2.0):
        data = synthetic(alpha=0.0, beta=beta, clients=2000, examples=10, test_fraction=0.0)
        centres = client_means(data)[:, 40:]  # little noise in the last features
        assert centres.var(axis=0).mean() == pytest.approx(1 + beta**2, rel=0.1)
        # B_k is common to all features of a client, so the means over features keep beta's part.
        assert centres.mean(axis=1).var() == pytest.approx(beta**2 + 1 / 20, rel=0.2)


def test_iid_clients_share_one_model_and_one_centre() -> None:
    data = synthetic(iid=True, clients=40, examples=500, test_fraction=0.0)
    centres = client_means(data)
    assert np.abs(centres).max() < 0.25  # 5 standard deviations of a mean of 500
    # One softmax model explains everybody's labels; fitted on half of the clients it holds for the rest.
    from sklearn.linear_model import LogisticRegression

    inputs, targets = data.train.inputs.numpy(), data.train.targets.numpy()
    half = len(inputs) // 2
    fitted = LogisticRegression(max_iter=300).fit(inputs[:half], targets[:half])
    assert fitted.score(inputs[half:], targets[half:]) > 0.9


def test_with_alpha_and_beta_1_no_single_model_explains_all_clients() -> None:
    from sklearn.linear_model import LogisticRegression

    data = synthetic(clients=40, examples=500, test_fraction=0.0)
    inputs, targets = data.train.inputs.numpy(), data.train.targets.numpy()
    half = len(inputs) // 2
    fitted = LogisticRegression(max_iter=300, tol=1e-2).fit(inputs[:half], targets[:half])
    assert fitted.score(inputs[half:], targets[half:]) < 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": -1.0},
        {"beta": -0.1},
        {"clients": 0},
        {"features": 0},
        {"classes": 1},
        {"examples": 0},
        {"test_fraction": 1.0},
    ],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        synthetic(**wrong)
    assert caught.value.code == "FS-DAT-011"

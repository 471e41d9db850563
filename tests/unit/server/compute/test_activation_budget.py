"""Measuring what autograd saves, and predicting what it will save."""

import torch

from petals.server.compute.activation_budget import ActivationBudget, Meter


def test_saved_storages_count_once_and_weights_not_at_all() -> None:
    weight, states = torch.ones(8, 8), torch.ones(4, 8, requires_grad=True)
    meter = Meter(frozenset([weight.untyped_storage().data_ptr()]))
    with meter.running():
        product = states @ weight
        output = product.square() + product[:2].exp().sum() + (product * product).sum()
    # The product once, however often it is used, and what exp put out.
    assert meter.num_bytes == product.nbytes + product[:2].nbytes
    (gradient,) = torch.autograd.grad(output.sum(), states)
    assert gradient.abs().sum() > 0


def test_a_budget_learns_what_a_token_costs() -> None:
    budget = ActivationBudget(1000)
    assert budget.fits(10, 10)
    budget.take_graph(400, num_tokens=10, num_blocks=2)
    assert budget.tokens_within() == 30
    assert budget.fits(15, 2) and not budget.fits(16, 2)
    budget.give_back(400)
    assert budget.used_bytes == 0 and budget.fits(25, 2)


def test_without_memory_nothing_fits() -> None:
    assert not ActivationBudget(0).fits(1, 1)

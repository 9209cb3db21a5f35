"""The counter-examples of docs/reproduce.md to the proof of Proposition 1, by autograd."""

import torch
from torch import Tensor
from torch.testing import assert_close

ONE, OTHER = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])  # x and x'
TRUNK = torch.tensor([[1.0, -0.75], [0.0, 0.5]])


def jacobian(x: Tensor, tail: Tensor, of: str) -> Tensor:
    """The derivative of the two outputs by all weights of one part [outputs, weights]."""

    def outputs(weights: Tensor) -> Tensor:
        parts = {"trunk": TRUNK, "tail": tail} | {of: weights}
        return parts["tail"] @ (parts["trunk"] @ x)

    weights = {"trunk": TRUNK, "tail": tail}[of]
    found = torch.autograd.functional.jacobian(outputs, weights)
    assert isinstance(found, Tensor)
    return found.flatten(1)


def kernel(tail: Tensor, of: str) -> Tensor:
    return jacobian(OTHER, tail, of) @ jacobian(ONE, tail, of).T


def test_the_bound_of_step_4_does_not_fall_with_the_inner_product() -> None:
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])  # Q is the identity
    bounded = one.norm() * other.norm()
    bound = (one @ one + other @ other) / 2
    apart = (other - one).square().sum()
    assert_close(bound, other @ one + apart / 2)
    assert bounded <= bound
    assert bounded > other @ one + apart / 4  # as printed
    assert other @ one == 0


def test_states_at_right_angles_have_a_kernel() -> None:
    assert_close(TRUNK @ OTHER, torch.tensor([0.0, 0.4]))
    assert_close((TRUNK @ OTHER) @ (TRUNK @ ONE), torch.tensor(0.0))
    assert_close(kernel(torch.eye(2), "trunk"), 0.6 * torch.eye(2))


def test_a_frozen_tail_has_a_jacobian() -> None:
    tail = torch.diag(torch.tensor([1.0, 2.0]))
    assert jacobian(ONE, tail, "tail").norm() > 0
    assert_close(kernel(tail, "trunk"), torch.diag(torch.tensor([0.6, 2.4])))
    assert_close(kernel(tail, "tail"), torch.zeros(2, 2))  # what right angles do make zero

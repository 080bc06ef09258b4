"""XGrad around optimizers of other packages: two explicit copies, bit for bit, checkpoints, and what is refused."""

import copy

import pytest
import torch
from twins import same_bits
from xgrad_bases import TwoCopies, give, values, wrapped

from xgrad_optim import XGrad

SHAPES = [(6, 4), (8,)]


def _of(package, name, **options):
    def make(params):
        module = pytest.importorskip(package, reason="make test-clients installs it")
        return getattr(module, name)(params, lr=1e-2, **options)

    return make


BASES = {
    "Lion": _of("lion_pytorch", "Lion"),
    "SOAP": _of("pytorch_optimizer", "SOAP", precondition_frequency=2),
    "Shampoo": _of("pytorch_optimizer", "Shampoo"),
    "AdaBelief": _of("pytorch_optimizer", "AdaBelief"),
    "8-bit AdamW of torchao": _of("torchao.optim", "AdamW8bit", block_size=8),
    "8-bit AdamW of bitsandbytes": _of("bitsandbytes.optim", "AdamW8bit", min_8bit_size=1),
    "AdamW of heavyball": _of("heavyball", "AdamW"),
}


@pytest.fixture(autouse=True)
def eager():
    """torchao and heavyball compile their steps, which takes a minute here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("name", BASES)
def test_it_equals_two_copies_and_resumes(name):
    start = values(SHAPES, torch.float32)
    literal = TwoCopies(BASES[name], start, 1.5)
    optimizer, params = wrapped(BASES[name], start, prediction_steps=1.5)
    for step in range(5):
        grads = values(SHAPES, torch.float32, step + 1)
        give(params, grads)
        literal.step([grad.clone() for grad in grads])
        optimizer.step()
        for mode in (True, False, True):
            optimizer.train(mode)
            assert all(map(same_bits, params, literal.held(mode)))
    assert any(d.any() for d in literal.shifted)
    resumed, others = wrapped(BASES[name], [param.detach() for param in params])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, some in ((optimizer, params), (resumed, others)):
        give(some, values(SHAPES, torch.float32, 9))
        own.step()
    assert all(map(same_bits, params, others))


def test_schedule_free_optimizers_have_two_weights_already():
    schedulefree = pytest.importorskip("schedulefree", reason="make test-clients installs it")
    base = schedulefree.AdamWScheduleFree([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"AdamWScheduleFree has eval\(\) and train\(\) of its own"):
        XGrad(base)


def test_accelerate_trains_with_it():
    accelerate = pytest.importorskip("accelerate", reason="make test-clients installs it")
    model = torch.nn.Linear(4, 1)
    optimizer = XGrad(BASES["Lion"](model.parameters()))
    optimizer.attach(model)
    accelerator = accelerate.Accelerator(cpu=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    prepared, wrapper, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for _ in range(3):
        accelerator.backward(prepared.train()(torch.ones(2, 4)).square().mean())
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        wrapper.step()
        scheduler.step()
        wrapper.zero_grad()
    assert optimizer.predicted
    prepared.eval()
    assert not optimizer.predicted

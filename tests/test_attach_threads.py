"""Threads that evaluate, save or step at once leave theta and theta_hat whole, and a fork leaves nothing locked.

Forwards only read, so torch lets several threads evaluate a model. The first of them finds theta_hat in place after a
step: without a lock two of them undo the prediction, or one runs at half of it.
"""

import copy
import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attached import X, attached, both_weights, equal, set_mode
from cases import loss_of
from torch import nn

from xgrad_optim import XAdamW

N_THREADS = 6
either_backend = pytest.mark.parametrize("backend", ["torch", None])


def wide_model():
    """Large enough for a swap to take longer than a thread to start."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(300, 300) for _ in range(4)))


def all_at_once(*functions):
    """Run them in threads of their own that start together; what they return, or the first error."""
    start = threading.Barrier(len(functions))

    def run(function):
        start.wait()
        with torch.no_grad():
            return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


@pytest.mark.parametrize(("backend", "n_runs"), [("torch", 30), (None, 200)])
def test_threads_that_evaluate_after_a_step_all_see_theta(backend, n_runs):
    model = wide_model()
    optimizer = XAdamW(model.parameters(), lr=1e-3, backend=backend)
    optimizer.attach(model)
    x = torch.randn(2, 300)
    model(x).square().mean().backward()
    optimizer.step()
    theta, theta_hat = both_weights(optimizer)
    expected = model.eval()(x).detach()
    for _ in range(n_runs):
        optimizer.train()
        set_mode(model, False)
        outputs = all_at_once(*[lambda: model(x)] * N_THREADS)
        assert all(torch.equal(output, expected) for output in outputs)
        assert equal(model.parameters(), theta)
    optimizer.train()
    assert equal(model.parameters(), theta_hat)


@either_backend
def test_swaps_and_steps_of_threads_exclude_each_other(backend):
    """Whatever the order was, the end is that of as many steps."""
    model, twin = wide_model(), wide_model()
    optimizer, expected = (XAdamW(each.parameters(), lr=1e-3, backend=backend) for each in (model, twin))
    for each, of in ((model, optimizer), (twin, expected)):
        of.attach(each)
        each(torch.ones(1, 300)).square().mean().backward()
        of.step()

    def swap():
        for _ in range(10):
            optimizer.eval()
            optimizer.train()

    def save():
        for _ in range(10):
            optimizer.state_dict()
            model.state_dict()
            with optimizer.true_weights():
                pass

    def step():
        for _ in range(10):
            optimizer.step()

    all_at_once(swap, save, step, save, swap)
    for _ in range(10):
        expected.step()
    for mode in (False, True):
        optimizer.train(mode)
        expected.train(mode)
        assert equal(model.parameters(), twin.parameters())


def test_overlapping_blocks_of_true_weights_end_with_the_last():
    """Two threads evaluate, each in a block; the one that ends first leaves theta to the other."""
    model, optimizer = attached()
    theta, theta_hat = both_weights(optimizer)
    first, second = optimizer.true_weights(), optimizer.true_weights()
    with second:
        with first:
            pass
        assert equal(model.parameters(), theta)
    assert equal(model.parameters(), theta_hat)
    first, second = optimizer.true_weights(), optimizer.true_weights()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert equal(model.parameters(), theta)
    model.train()(X)
    assert equal(model.parameters(), theta), "the second one still holds it"
    second.__exit__(None, None, None)
    assert equal(model.parameters(), theta_hat)
    model(X)
    assert equal(model.parameters(), theta_hat)


def test_a_forward_that_finds_its_weights_waits_for_nobody():
    model, optimizer = attached()
    model.eval()
    with optimizer._exchange.lock, ThreadPoolExecutor(1) as pool:
        pool.submit(model, X).result(timeout=60)


def test_the_closure_of_a_step_may_use_other_threads():
    """DataParallel runs its replicas in threads: they must not wait for the step that waits for them."""
    model, optimizer = attached()
    optimizer.eval()

    def closure():
        optimizer.zero_grad()
        with ThreadPoolExecutor(1) as pool:
            loss = pool.submit(loss_of, model, 3).result(timeout=60)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.predicted


def test_a_module_that_runs_in_one_thread_does_not_speak_for_another():
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    inside, proceed = threading.Event(), threading.Event()

    def wait(module, args):
        if not inside.is_set():
            inside.set()
            assert proceed.wait(60)

    model[1].register_forward_pre_hook(wait)
    optimizer.eval()
    set_mode(model, False)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(model, X)
        assert inside.wait(60)
        optimizer.train()
        part = model[0](X)
        proceed.set()
        running.result(timeout=60)
    assert torch.equal(part, nn.functional.linear(X, *theta[:2]))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copied_optimizer_has_a_lock_of_its_own(make_copy):
    _, optimizer = attached()
    with optimizer._exchange.lock, ThreadPoolExecutor(1) as pool:
        copied = make_copy(optimizer)
        pool.submit(copied.eval).result(timeout=60)
    assert copied._exchange is not optimizer._exchange and optimizer.predicted
    assert pickle.loads(pickle.dumps(optimizer._exchange)).lock is not optimizer._exchange.lock


def in_child(optimizer, pipe):
    optimizer.eval()
    pipe.send([param.tolist() for param in optimizer.param_groups[0]["params"]])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python's, of forks beside threads
def test_a_fork_waits_for_a_swap_and_leaves_no_lock_behind():
    """A data loader starts its workers while another thread steps."""
    model, optimizer = attached()
    theta, theta_hat = both_weights(optimizer)
    context = multiprocessing.get_context("fork")
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            optimizer.eval()
            optimizer.train()

    with ThreadPoolExecutor(1) as pool:
        swapping = pool.submit(swap)
        try:
            for _ in range(20):
                receiver, sender = context.Pipe(duplex=False)
                child = context.Process(target=in_child, args=(optimizer, sender), daemon=True)
                child.start()
                assert receiver.poll(20), "the child waits for a lock that nobody holds there"
                assert receiver.recv() == [param.tolist() for param in theta]
                child.join()
        finally:
            stop.set()
        swapping.result(timeout=60)
    assert equal(model.parameters(), theta_hat)

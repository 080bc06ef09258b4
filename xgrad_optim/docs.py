"""Docstring fragments that the optimizers share."""

COMMON_DOC = """\
        prediction_steps (float): how many steps ahead the weights are predicted, >= 0; 0 is the base optimizer.
            A param-group option: a scheduler may change it, and groups may differ.
        master_weights (bool): keep theta in float32 (float64 for float64 parameters) in ``state``, and the other
            state likewise: mixed precision for bfloat16 and float16 parameters.
        backend (str, optional): "triton", "cuda", "cpu", "torch", or None for the best that can run.
        maximize (bool): ascend instead of descend.
        foreach (bool, optional): True means ``backend="torch"``.
        capturable (bool): for CUDA graphs; needs parameters on a GPU.
        differentiable (bool): must be False.
        fused (bool, optional): True demands a native back end, False means ``backend="torch"``.

    Parameters are float64, float32, bfloat16, float16, complex128 or complex64, of any shape and strides. After
    :meth:`step` they hold theta_hat; :meth:`eval` puts theta into them, :meth:`train` theta_hat back.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a value out of its range.
        RuntimeError: options that exclude each other, or a demanded back end that this machine lacks.
        NotImplementedError: ``differentiable=True``.
"""

ADAM_ARGS_DOC = """
    Args:
        params: parameters, named parameters or param groups, as every torch optimizer takes them.
        lr (float or 1-element Tensor): learning rate, >= 0.
        betas (pair of floats): decay rates of exp_avg and exp_avg_sq, each in [0, 1).
        eps (float): {eps}.
        weight_decay (float): {weight_decay}.
        amsgrad (bool): use the running maximum of exp_avg_sq."""

DECOUPLED_DOC = """\
        decoupled_weight_decay (bool): decay the weights as AdamW does; False adds an L2 penalty to the gradient."""

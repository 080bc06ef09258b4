"""A device for torch, "lategpu", whose streams run nothing until somebody waits, and Triton's JIT in front of it.

Every copy and every kernel happens as late as a GPU could let it happen: after the host has run ahead, has changed what
it copied from, and has freed what a kernel was given. Freed memory is poisoned in the order of its stream and handed
out again at once. Compiled Triton kernels run in ptxsim at the tensors' real addresses, when their stream does.

    device.py          the device: streams, graphs, counts, faults on purpose; csrc/ is what it is made of
    launches.py        runs compiled kernels on it
    triton_driver.py   lets Triton launch on it
    process.py         runs the tests of this folder in a process of their own

It can't show what ptxas does, timing, races inside of a kernel, or several devices, and its streams are our model of
CUDA's. One thread at a time may use it.
"""

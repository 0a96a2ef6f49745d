"""A training step as one CUDA graph, and batches copied to the device ahead of their step.

    step = capture_step(step, example_batch, model=model, optimizer=optimizer)
    for batch in feed(loader, device):
        loss = step(*batch)

Needs only PyTorch. On CPU `capture_step` returns the step unchanged.
"""
import torch

# Their state begins at zero, to which recording returns it.
KNOWN_OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop)


def capture_step(step, example_inputs, *, model=None, optimizer=None, record=None):
    """Record `step` once as a CUDA graph; return a callable with its signature that replays it.

    step(*tensors on the device) -> a tensor or a tuple of tensors. It runs only device code, the
    same at each call (no printing, no `.item()`), with `optimizer.zero_grad(set_to_none=True)` in
    it, and exchanges nothing with other processes. A replay costs the host microseconds; launching
    the step's 300 kernels one by one takes it longer than the GPU needs to run them.
    model, optimizer: what the step changes. Recording runs the step a few times, then restores
    these, and the random generator, to the bit. The learning rate may change between calls. Inputs
    may be on the CPU; inputs of another shape (a short last batch) run the step eagerly. Off CUDA,
    with an optimiser that is not in KNOWN_OPTIMIZERS, or if recording fails (it prints why),
    returns `step`. record: see `record_cuda_graph`.
    """
    device = example_inputs[0].device if model is None else next(model.parameters()).device
    if record is None and device.type != "cuda":
        return step
    if optimizer is not None and type(optimizer) not in KNOWN_OPTIMIZERS:
        print(f"no CUDA graph of a step of {type(optimizer).__name__}; it is launched kernel by "
              "kernel", flush=True)
        return step
    try:
        return CapturedStep(step, example_inputs, device, model, optimizer,
                            record or record_cuda_graph)
    except Exception as error:  # noqa: BLE001 - other people's models and losses fail in many ways
        reason = " ".join(str(error).split())[:160]
        print(f"no CUDA graph of this step ({type(error).__name__}: {reason}); it is launched "
              "kernel by kernel", flush=True)
        return step


def capture_inference(function, example_inputs, *, record=None):
    """`capture_step` of a function without gradients, such as a model in evaluation mode."""
    return capture_step(torch.no_grad()(function), example_inputs, record=record)


def record_cuda_graph(run):
    """Run `run` three times, then record it; return (replay, its static output)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):             # compiles kernels, allocates workspaces
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph.replay, output


class CapturedStep:
    """See `capture_step`."""

    def __init__(self, step, example_inputs, device, model, optimizer, record):
        self.step, self.device = step, device
        self.inputs = [t.to(device, copy=True) for t in example_inputs]
        self.groups = optimizer.param_groups if optimizer is not None else []
        rates = [float(group["lr"]) for group in self.groups]
        self.rates = [torch.tensor(rate, device=device) for rate in rates]
        # by name: the first call may store weights in another order (kernels.accelerate)
        weights = {} if model is None else {name: t.clone()
                                            for name, t in model.state_dict().items()}
        state = [(t, t.clone()) for t in optimizer_tensors(optimizer)]
        random_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        try:
            for group, rate in zip(self.groups, self.rates):
                group["lr"] = rate              # read from the device at each replay
                if device.type == "cuda" and "capturable" in group:
                    group["capturable"] = True
            self.replay, self.output = record(lambda: step(*self.inputs))
        finally:
            for group, rate in zip(self.groups, rates):
                group["lr"] = rate
            now = {} if model is None else model.state_dict()
            with torch.no_grad():
                for name, before in weights.items():
                    now[name].copy_(before)
                for tensor in optimizer_tensors(optimizer):     # those that recording has made
                    tensor.zero_()
                for tensor, before in state:
                    tensor.copy_(before)
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
            if random_state is not None:
                torch.cuda.set_rng_state(random_state, device)

    def __call__(self, *inputs):
        if [t.shape for t in inputs] != [t.shape for t in self.inputs]:
            return self.step(*(t.to(self.device, non_blocking=True) for t in inputs))
        for static, given in zip(self.inputs, inputs):
            static.copy_(given, non_blocking=True)
        for rate, group in zip(self.rates, self.groups):
            rate.fill_(group["lr"])
        self.replay()
        if isinstance(self.output, torch.Tensor):
            return self.output.clone()
        return tuple(t.clone() for t in self.output)


def optimizer_tensors(optimizer):
    """The tensors of an optimiser's state; [] without an optimiser."""
    return [t for state in (optimizer.state.values() if optimizer else ()) for t in state.values()
            if isinstance(t, torch.Tensor)]


def feed(batches, device: torch.device):
    """Yield the batches (tuples of tensors) on `device`. From pinned memory they are copied to
    CUDA on a separate stream while the previous step is still running."""
    if device.type != "cuda":
        for batch in batches:
            yield tuple(t.to(device) for t in batch)
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            batch = tuple(t.to(device, non_blocking=True) for t in batch)
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for tensor in batch:
            tensor.record_stream(current)       # keeps its memory until this stream has used it
        yield batch

"""A training step as one CUDA graph, and batches that arrive on the device in time.

    step = capture_step(step, example_batch, model=model, optimizer=optimizer)
    for batch in feed(loader, device):
        loss = step(*batch)

It needs PyTorch and nothing else. On CPU `capture_step` returns the step as it is.
"""
import torch


def capture_step(step, example_inputs, *, model=None, optimizer=None, tensors=(), record=None):
    """`step` recorded once as a CUDA graph: a callable of the same signature that replays it.

    step(*tensors on the device) -> a tensor or a tuple of them: device code only, the same at each
    call (no printing, no `.item()`), with `optimizer.zero_grad(set_to_none=True)` in it. One replay
    costs the host microseconds, where the step's 300 launches take it longer than the card needs.
    model, optimizer, tensors: what the step changes. Recording runs the step a few times and then
    puts these back to the bit (and the random generator). The optimiser's rate may change between
    calls, as schedulers do. Inputs may be on the CPU; inputs of other shapes (a last short batch)
    take the same step eagerly. Off CUDA, or where recording fails (then a line says why), this
    returns `step`. record: what records, for tests (see `record_cuda_graph`).
    """
    device = example_inputs[0].device if model is None else next(model.parameters()).device
    if record is None and device.type != "cuda":
        return step
    if torch.distributed.is_available() and torch.distributed.is_initialized() and (
            optimizer is not None and torch.distributed.get_world_size() > 1):
        print("several processes: each step is launched kernel by kernel (no CUDA graph)")
        return step
    try:
        return CapturedStep(step, example_inputs, device, model, optimizer, tensors,
                            record or record_cuda_graph)
    except Exception as error:  # noqa: BLE001 - a foreign model or loss fails in many ways
        reason = " ".join(str(error).split())[:160]
        print(f"no CUDA graph of this step ({type(error).__name__}: {reason}); it is launched "
              "kernel by kernel", flush=True)
        return step


def capture_inference(function, example_inputs, *, record=None):
    """As `capture_step`, for a function without gradients, such as a model in evaluation mode."""
    def step(*inputs):
        with torch.no_grad():
            return function(*inputs)

    return capture_step(step, example_inputs, record=record)


def record_cuda_graph(run):
    """(replay, the static output) of run(), which has then run three times and is recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):             # compiles, takes workspaces
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph.replay, output


class CapturedStep:
    """See `capture_step`."""

    def __init__(self, step, example_inputs, device, model, optimizer, tensors, record):
        self.step, self.device = step, device
        self.inputs = [t.to(device, copy=True) for t in example_inputs]
        self.groups = optimizer.param_groups if optimizer is not None else []
        rates = [float(group["lr"]) for group in self.groups]
        self.rates = [torch.tensor(rate, device=device) for rate in rates]
        # by name: the first call may store weights in another order (kernels.accelerate)
        weights = {} if model is None else {name: t.detach().clone()
                                            for name, t in model.state_dict().items()}
        kept = list(tensors) + optimizer_tensors(optimizer)
        saved = [t.detach().clone() for t in kept]
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
                for tensor, before in zip(kept, saved):
                    tensor.copy_(before)
                known = {id(t) for t in kept}
                for tensor in optimizer_tensors(optimizer):     # made by the first step, from zero
                    if id(tensor) not in known:
                        tensor.zero_()
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
    """The tensors of an optimiser's state."""
    if optimizer is None:
        return []
    return [t for state in optimizer.state.values() for t in state.values()
            if isinstance(t, torch.Tensor)]


def feed(batches, device: torch.device):
    """The batches (tuples of tensors) on `device`; from pinned memory they are copied to CUDA on a
    stream of their own, while the step before is still running."""
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
            tensor.record_stream(current)       # its memory is not free before this stream is done
        yield batch

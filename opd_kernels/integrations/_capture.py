"""The input and the operands of a model's head, taken from one forward pass of one thread.

Hooks on the head store its input, let it compute at most one row, and return a few probe values in
place of logits. The model's output for the probes then shows its scale and softcap, for every
architecture in the same way. A model that changes its logits in any other way is refused.

No module changes: the hooks of a capture act in its own thread only, and until it is closed. Other
threads use the model as before, also after an exception.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd_kernels.integrations._heads import check_head_is_loaded, weight_and_bias
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.parallel import plain

# Powers of two, so that a scale is recovered exactly. A softcap does not change the first one, and
# the last one saturates any softcap.
_PROBES = (2.0**-12, 0.5, -0.5, 2.0, -2.0, 16.0, -16.0, 2.0**20)


class _Thread(threading.local):
    capture: "HeadCapture | None" = None  # the open capture of this thread


_thread = _Thread()


class _ProbeLogits(Tensor):
    """The probes as the head's output [..., len(_PROBES)]. A slice of leading columns, with which a
    model removes the padding of its vocabulary, is stored in the capture and not applied.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and _thread.capture is not None:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            columns = parts[-1].stop if isinstance(parts[-1], slice) else None
            is_last = len(parts) == args[0].dim() or Ellipsis in parts[:-1]
            if is_last and parts[-1] == slice(None, columns) and (columns or 0) > 0:
                _thread.capture.columns = columns
                args = (args[0], (*parts[:-1], slice(None)))
        result = super().__torch_function__(func, types, args, kwargs or {})
        # A number that a hook computes has no columns, and a subclass could not be formatted.
        is_number = isinstance(result, _ProbeLogits) and result.dim() == 0
        return result.as_subclass(Tensor) if is_number else result


@dataclass(eq=False)
class HeadCapture:
    """What a forward pass did with the head."""

    name: str  # of the model's class
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    columns: int | None = None  # of the logits that the model keeps; None for all
    calls: int = 0  # of the head
    autocast: tuple[torch.dtype, bool] = (torch.bfloat16, False)  # at the head: dtype, enabled
    on_output: Callable[[Any], Any] | None = None  # computes what replaces the model's output

    def __reduce__(self) -> Any:
        """A copy or a pickle of the model that another thread makes has hooks without effect."""
        return HeadCapture, (self.name,)

    @property
    def is_open(self) -> bool:
        """Whether a call belongs to the captured forward pass. A hook that is traced by
        torch.compile in another thread must stay without effect in its graph.
        """
        return not torch.compiler.is_compiling() and _thread.capture is self

    def close(self) -> None:
        """End the capture. Calls of the model inside the loss are ordinary ones again."""
        _thread.capture = None

    def lazy_logits(self, output: Any, temperature: float, vocab_size: int | None) -> LazyLogits:
        """Close the capture and return the logits that the model's output stands for."""
        self.close()
        scale, softcap = _scale_and_softcap(self._probe_logits(output), self.name)
        assert self.hidden is not None
        assert self.weight is not None
        if plain(self.weight).untyped_storage().nbytes() == 0 < self.weight.numel():
            raise ValueError(
                f"model: FSDP has freed the weight of {self.name}'s head after its forward pass; "
                "wrap the head with reshard_after_forward=False, or leave it to the root module"
            )
        # With the model split over devices (device_map), the decoder can end on another device.
        hidden = self.hidden.to(plain(self.weight).device)
        if vocab_size is None and self.columns is not None:
            vocab_size = min(self.columns, self.weight.shape[0])
        return LazyLogits(hidden, self.weight, self.bias, softcap, scale, temperature, vocab_size)

    def replace_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hook after a module around the model: replace its output."""
        return self.on_output(output) if self.is_open and self.on_output is not None else None

    def _probe_logits(self, output: Any) -> Tensor:
        """Return the model's logits [len(_PROBES)] for the probes. Raise ValueError unless they
        come from one call of the head.
        """
        logits = getattr(output, "logits", None)
        if self.calls > 1:
            raise ValueError(
                f"model: expected {self.name} to call its output embeddings once per forward pass, "
                f"got {self.calls} calls; its logits cannot be computed lazily"
            )
        if (
            self.hidden is None
            or not isinstance(logits, Tensor)
            or logits.shape[-1:] != (len(_PROBES),)
        ):
            raise ValueError(
                f"model: {self.name} computes logits without calling its output embeddings; they "
                "cannot be computed lazily. If its forward is compiled, compile only the decoder "
                "(model.model)"
            )
        if logits.shape[:-1] != self.hidden.shape[:-1]:
            raise ValueError(
                f"model: {self.name} returns logits [..., V] with the leading shape "
                f"{tuple(logits.shape[:-1])} for hidden states with "
                f"{tuple(self.hidden.shape[:-1])}; build LazyLogits from its hidden states yourself"
            )
        rows = logits.detach().as_subclass(Tensor).reshape(-1, len(_PROBES))
        if (rows != rows[:1]).any():
            raise ValueError(
                f"model: expected {self.name} to treat the logits of all tokens alike, got other "
                "values for other tokens; build LazyLogits from its hidden states yourself"
            )
        return rows[0].double()

    def _store_input(self, head: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Hook before the head: store its input, and pass on 0 or 1 rows. A thread that calls
        the head while another one removes this hook passes no kwargs.
        """
        if not self.is_open:
            return None
        hidden = args[0] if args else next(iter(kwargs.values()))
        self.calls += 1
        self.hidden = hidden
        self.weight, self.bias = weight_and_bias(head, hidden)
        device_type = hidden.device.type
        self.autocast = (
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_enabled(device_type),
        )
        # A product of one row reads the whole weight, so there is none. But hooks of others, such
        # as those of transformers' debugger, may fail for an empty input, so they get one row.
        # With three dimensions, DTensors cannot restore the shape of a product without rows.
        has_other_hooks = len(head._forward_hooks) > 1
        few_rows = hidden.reshape(-1, hidden.shape[-1])[: int(has_other_hooks)]
        if args:
            return (few_rows, *args[1:]), kwargs
        return args, kwargs | {next(iter(kwargs)): few_rows}

    def _return_probes(self, head: nn.Module, args: Any, output: Any) -> Any:
        """Hook after the head: replace its output."""
        if not self.is_open or self.hidden is None:
            return None
        dtype = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
        probes = torch.tensor(_PROBES, dtype=dtype, device=self.hidden.device)
        return probes.repeat(*self.hidden.shape[:-1], 1).as_subclass(_ProbeLogits)


@contextmanager
def captured_head(
    model: PreTrainedModel, wrappers: Iterable[nn.Module] = ()
) -> Iterator[HeadCapture]:
    """Capture the head in the first forward pass of this thread inside the context.

    Args:
        model: the model with the head.
        wrappers: the modules around it that are called, such as DDP's and PEFT's.
    """
    head = model.get_output_embeddings()
    name = type(model).__name__
    if head is None:
        raise ValueError(
            f"model: {name} has no output embeddings; pass a model with a language-model head"
        )
    check_head_is_loaded(head)
    for module in (*wrappers, model, head):
        _let_captures_bypass_compilation(module)
    # Inkling compares this key with the width of its logits, so no slice of the probes shows it.
    columns = getattr(model.config.get_text_config(), "unpadded_vocab_size", None)
    capture = HeadCapture(name, columns=columns)
    with ExitStack() as stack:
        # A hook of a decoder may capture a head inside a forward pass that is captured itself.
        stack.callback(setattr, _thread, "capture", _thread.capture)
        # The last hook before the head sees its final input. The first one after it leaves the
        # output to the others, such as those of tensor parallelism.
        before = head.register_forward_pre_hook(capture._store_input, with_kwargs=True)
        stack.callback(before.remove)
        after = head.register_forward_hook(capture._return_probes, prepend=True)
        stack.callback(after.remove)
        _thread.capture = capture
        try:
            yield capture
        except RuntimeError as error:
            # The probes have another width than the logits, and a bias [V] does not fit them.
            is_after_head = capture.is_open and capture.hidden is not None
            if not is_after_head or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"model: expected {name} to only scale or softcap its logits, got an error for "
                f"probe values ({error}); build LazyLogits from its hidden states yourself"
            ) from error


class _CompiledCall:
    """A compiled function of a module, and the same function without compilation for captures:
    torch.compile ignores hooks that are added after it has traced a module.
    """

    def __init__(self, compiled: Callable[..., Any], eager: Callable[..., Any]) -> None:
        update_wrapper(self, compiled)
        self._compiled, self._eager = compiled, eager

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._compiled if _thread.capture is None else self._eager)(*args, **kwargs)


def _let_captures_bypass_compilation(module: nn.Module) -> None:
    """Let threads with an open capture run the module without compilation, after module.compile()
    or module.forward = torch.compile(module.forward). Nothing changes for other threads.
    """
    compiled = module._compiled_call_impl
    if compiled is not None and not isinstance(compiled, _CompiledCall):
        module._compiled_call_impl = _CompiledCall(compiled, module._call_impl)
    forward: Any = module.__dict__.get("forward")
    eager = getattr(forward, "_torchdynamo_orig_callable", None)
    if eager is not None and not isinstance(forward, _CompiledCall):
        module.forward = _CompiledCall(forward, eager)


def _scale_and_softcap(probe_logits: Tensor, name: str) -> tuple[float, float | None]:
    """Return the scale and the softcap of softcap * tanh(scale * x / softcap), or of scale * x,
    that map the probes to probe_logits. Raise ValueError if neither does.
    """
    probes = torch.tensor(_PROBES, dtype=torch.float64, device=probe_logits.device)
    scale = float(probe_logits[-1] / probes[-1])
    if torch.allclose(probe_logits, scale * probes, rtol=1e-6, atol=0):
        return scale, None
    softcap = abs(float(probe_logits[-1]))
    if softcap > 0:
        # tanh(x) = x to float32's precision at the first probe, unless the softcap is tiny.
        share = (probe_logits[0] / softcap).clamp(-1, 1)
        scale = float(torch.atanh(share) * softcap / probes[0])
        scale = 1.0 if abs(scale - 1) < 1e-6 else scale
        capped = softcap * torch.tanh(scale * probes / softcap)
        if torch.allclose(probe_logits, capped, rtol=1e-5):
            return scale, softcap
    raise ValueError(
        f"model: expected {name} to only scale or softcap its logits, but it maps {_PROBES} to "
        f"{tuple(round(x, 4) for x in probe_logits.tolist())}; build LazyLogits from its hidden "
        "states yourself"
    )

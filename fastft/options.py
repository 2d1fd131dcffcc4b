"""Options of the backend: `torch.compile(model, backend="fastft", options={...})`.

| option | type | default | meaning |
|---|---|---|---|
| `disable` | list of pass names | `[]` | passes that are not run |
| `strict` | bool | `False` | a failing pass, lowering or kernel raises instead of being dropped with a warning |
| `logits` | str | `"deferred"` | logits that only the loss reads are computed when something else reads them; `"materialize"`: in every forward |
| `pack_weights` | bool | `False` | frozen 16-bit base weights move into padded storage whose tail columns hold the adapters |
| `keep_dequantized` | bool | `False` | quantized weights are dequantized once and kept, 16 bits each: no dequantization in the steps |
| `base_compute` | str | `"base"` | the dtype of products with frozen weights: the base's own, or `"fp8"` (e4m3, row-wise scales; changes numerics) |
| `inductor` | dict | `{}` | Inductor configuration, as `options` of `backend="inductor"` |
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from fastft import _torch


def unknown(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist, with the nearest one that does."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"fastft: unknown {kind} {name!r}{hint} Known: {', '.join(known)}")


# What options of strings take, the default first.
CHOICES = {"logits": ("deferred", "materialize"), "base_compute": ("base", "fp8")}


@dataclasses.dataclass(frozen=True)
class Options:
    """The checked options of one `torch.compile` call. See the table in this module's docstring."""

    disable: tuple[str, ...] = ()
    strict: bool = False
    logits: str = "deferred"
    pack_weights: bool = False
    keep_dequantized: bool = False
    base_compute: str = "base"
    inductor: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None, passes: Iterable[str]) -> "Options":
        """Checks `options` and `mode` as `torch.compile` hands them over.

        Raises:
            ValueError: an unknown option, pass, mode or Inductor setting (the message names the nearest valid one),
                or a value of the wrong type.
        """
        values = dict(options or {})
        fields = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise unknown("option", name, fields)
        disable = values.pop("disable", ())
        if isinstance(disable, str) or not all(isinstance(name, str) for name in disable):
            raise ValueError(f"fastft: option 'disable' takes a list of pass names, not {disable!r}")
        for name in disable:
            if name not in passes:
                raise unknown("pass", name, passes)
        chosen = {}
        for name, known in CHOICES.items():
            chosen[name] = values.pop(name, known[0])
            if chosen[name] not in known:
                raise ValueError(f"fastft: option {name!r} takes {' or '.join(map(repr, known))}, not {chosen[name]!r}")
        if chosen["base_compute"] == "fp8" and values.get("pack_weights"):
            raise ValueError("fastft: option 'pack_weights' is for products in 16 bits: leave it out with 'base_compute': 'fp8'")
        inductor = values.pop("inductor", {})
        if not isinstance(inductor, Mapping):
            raise ValueError(f"fastft: option 'inductor' takes a dict of Inductor settings, not {inductor!r}")
        for name, value in values.items():
            if not isinstance(value, bool):
                raise ValueError(f"fastft: option {name!r} takes True or False, not {value!r}")
        modes = _torch.list_mode_options()
        if mode is not None and mode not in modes:
            raise unknown("mode", mode, modes)
        settings = {**(modes[mode] if mode else {}), **inductor}
        known = _torch.inductor_config.get_config_copy()
        for name in settings:
            if name.replace("-", "_") not in known:
                raise unknown("Inductor setting", name, known)
        settings = {name.replace("-", "_"): value for name, value in settings.items()}
        return cls(disable=tuple(sorted(disable)), inductor=tuple(sorted(settings.items())), **chosen, **values)

    def why_materialized(self) -> str | None:
        """Why logits must not be deferred; None where they may be."""
        if self.logits == "materialize":
            return 'options={"logits": "materialize"}'
        # What a deferred output holds would be overwritten by the next replay.
        return "CUDA graphs use the memory of outputs again" if self.cuda_graphs else None

    @property
    def cuda_graphs(self) -> bool:
        return bool(dict(self.inductor).get("triton.cudagraphs", _torch.inductor_config.triton.cudagraphs))

"""What `petals models plan` prints: a plan in, plain values and lines of text out.

Pure; knows the shape of a plan and no files, networks or terminals.
"""

from typing import TYPE_CHECKING, Any

from petals.errors import ConfigError
from petals.logs import plural

if TYPE_CHECKING:
    import torch

    from petals.models.loading.cost import Plan


def torch_dtype(name: str) -> "torch.dtype | None":
    """None lets the checkpoint decide. Raises ConfigError for a name that is no dtype."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in ("auto", "int8"):
        return None
    if name not in known:
        raise ConfigError(
            f"{name!r} is not a dtype for weights.", hint=f"Known: auto, int8, {', '.join(known)}."
        )
    return known[name]


def plan_values(model: str, plan: "Plan") -> dict[str, Any]:
    return {
        "model": model,
        "model_type": plan.model_type,
        "num_blocks": plan.num_blocks,
        "hidden_size": plan.hidden_size,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "quant": str(plan.quant),
        "client": {
            "num_parameters": plan.client_num_parameters,
            "weight_bytes": plan.client_weight_bytes,
        },
        "servers": [
            {
                "blocks": [share.blocks.start, share.blocks.end],
                "weight_bytes": share.weight_bytes,
                "kv_bytes_per_1000_tokens": share.kv_bytes_per_1000_tokens,
                "outbox_bytes_per_1000_tokens": share.outbox_bytes_per_1000_tokens,
            }
            for share in plan.servers
        ],
    }


def plan_lines(model: str, plan: "Plan") -> list[str]:
    values = plan_values(model, plan)
    lines = [
        f"{model}: {plan.model_type}, {plural(plan.num_blocks, 'block')}, "
        f"hidden size {plan.hidden_size}, "
        f"{values['dtype']}",
        f"client: {_size(plan.client_weight_bytes)} of weights",
        f"{'server':>6}  {'blocks':>9}  {'weights':>9}  {'KV/1000':>9}  {'outbox/1000':>11}",
    ]
    for number, share in enumerate(plan.servers, start=1):
        lines.append(
            f"{number:>6}  {str(share.blocks):>9}  {_size(share.weight_bytes):>9}  "
            f"{_size(share.kv_bytes_per_1000_tokens):>9}  "
            f"{_size(share.outbox_bytes_per_1000_tokens):>11}"
        )
    return lines


def _size(num_bytes: int) -> str:
    size, units = float(num_bytes), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 1000 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"

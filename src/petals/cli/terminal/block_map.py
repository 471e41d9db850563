"""A map of a model's servers: a view in, plain values and lines of text out.

Pure. Must not know network, clock and terminal.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petals.swarm.directory.records import View

MAP_WIDTH = 60
"""Most characters of a row of blocks."""


def block_map(view: "View") -> dict[str, Any]:
    """The view as plain values. `thinnest` are the blocks with the fewest ONLINE servers."""
    coverage = view.coverage()
    fewest = min(coverage, default=0)
    servers = sorted(view.records.values(), key=lambda record: (record.spans, record.peer_id))
    return {
        "model": view.model,
        "num_blocks": view.num_blocks,
        "complete": fewest > 0,
        "coverage": list(coverage),
        "thinnest": {
            "num_servers": fewest,
            "blocks": [block for block, count in enumerate(coverage) if count == fewest],
        },
        "missing": [[gap.start, gap.end] for gap in view.missing()],
        "servers": [
            {
                "peer_id": record.peer_id,
                "public_name": record.public_name,
                "state": str(record.state),
                "spans": [list(span) for span in record.spans],
                "dtype": record.dtype,
                "quant": record.quant,
                "throughput": round(record.throughput, 2),
                "cache_tokens": record.cache_tokens,
                "max_length": record.max_length,
                "version": record.version,
                "relayed": record.relayed,
            }
            for record in servers
        ],
        "blocks": [
            {"block": block, "servers": [record.peer_id for record in view.holders(block)]}
            for block in range(view.num_blocks)
        ],
    }


def draw_map(found: dict[str, Any]) -> list[str]:
    """The block map as lines of text: one row per server, one of counts, one that marks."""
    num_blocks = found["num_blocks"]
    columns = _columns(num_blocks)
    name_width = max([len(_name(server)) for server in found["servers"]] + [7])
    state = "complete" if found["complete"] else "INCOMPLETE"
    lines = [f"{found['model']}: {num_blocks} blocks, {len(found['servers'])} servers, {state}"]
    for server in found["servers"]:
        bar = "".join(_cell(server, start, end) for start, end in columns)
        spans = " ".join(f"{start}:{end}" for start, end in server["spans"])
        rest = f"{spans}  {server['state']}  {server['dtype']}  {server['throughput']:.0f} blocks/s"
        rest += "  through a relay" if server["relayed"] else ""
        lines.append(f"  {_name(server):<{name_width}}  {bar}  {rest}")
    coverage, thin = found["coverage"], found["thinnest"]
    counts = [min(coverage[start:end]) for start, end in columns]
    digits = "".join(str(min(count, 9)) for count in counts)
    marks = "".join("^" if count == thin["num_servers"] else " " for count in counts)
    lines.append(f"  {'servers':<{name_width}}  {digits}")
    lines.append(f"  {'':<{name_width}}  {marks}  {_thinnest(thin)}")
    return lines


def _columns(num_blocks: int) -> list[tuple[int, int]]:
    """Blocks under each character; large models share a character between neighbours."""
    per_column = max(1, -(-num_blocks // MAP_WIDTH))
    starts = range(0, num_blocks, per_column)
    return [(start, min(start + per_column, num_blocks)) for start in starts]


def _cell(server: dict[str, Any], start: int, end: int) -> str:
    held = any(s < end and start < e for s, e in server["spans"])
    if not held:
        return "·"
    return "█" if server["state"] == "online" else "░"


def _name(server: dict[str, Any]) -> str:
    short = f"…{server['peer_id'][-6:]}"
    return f"{server['public_name']} {short}" if server["public_name"] else short


def _thinnest(thin: dict[str, Any]) -> str:
    count, blocks = thin["num_servers"], thin["blocks"]
    if not blocks:
        return ""
    where = f"{len(blocks)} blocks, first {blocks[0]}" if len(blocks) > 1 else f"block {blocks[0]}"
    if count == 0:
        return f"^ no server: {where}"
    servers = "server" if count == 1 else "servers"
    return f"^ thinnest, {count} {servers}: {where}"

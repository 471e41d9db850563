"""A map of a model's servers: a view in, plain values and lines of text out.

Pure. Must not know network, clock and terminal.
"""

from typing import TYPE_CHECKING, Any

from petals.logs import plural

if TYPE_CHECKING:
    from petals.swarm.directory.records import View

MAP_WIDTH = 60
"""Most characters of a row of blocks."""

_MIN_MAP_WIDTH = 16
"""Fewest characters of a row of blocks of a large model, however narrow the terminal is."""


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


def draw_map(found: dict[str, Any], width: int = 120) -> list[str]:
    """The block map as lines of text: one row per server, one of counts, one that marks.

    ``width`` is that of the terminal, in characters; the blocks of large models share characters so
    that a row fits into it.
    """
    num_blocks = found["num_blocks"]
    name_width = max([len(_name(server)) for server in found["servers"]] + [7])
    facts = [_facts(server) for server in found["servers"]]
    room = width - name_width - max(map(len, facts), default=0) - 6
    columns = _columns(num_blocks, max(_MIN_MAP_WIDTH, min(room, MAP_WIDTH)))
    state = "complete" if found["complete"] else "INCOMPLETE"
    servers = plural(len(found["servers"]), "server")
    lines = [f"{found['model']}: {plural(num_blocks, 'block')}, {servers}, {state}"]
    for server, rest in zip(found["servers"], facts):
        bar = "".join(_cell(server, start, end) for start, end in columns)
        lines.append(f"  {_name(server):<{name_width}}  {bar}  {rest}")
    coverage, thin = found["coverage"], found["thinnest"]
    counts = [min(coverage[start:end]) for start, end in columns]
    digits = "".join(str(min(count, 9)) for count in counts)
    marks = "".join("^" if count == thin["num_servers"] else " " for count in counts)
    lines.append(f"  {'servers':<{name_width}}  {digits}")
    lines.append(f"  {'':<{name_width}}  {marks}  {_thinnest(thin)}")
    return lines


def _facts(server: dict[str, Any]) -> str:
    spans = " ".join(f"{start}:{end}" for start, end in server["spans"])
    facts = f"{spans}  {server['state']}  {server['dtype']}  {server['throughput']:.0f} blocks/s"
    return facts + ("  through a relay" if server["relayed"] else "")


def _columns(num_blocks: int, most: int) -> list[tuple[int, int]]:
    """Blocks under each of ``most`` characters; neighbours share one if there are more blocks."""
    per_column = max(1, -(-num_blocks // most))
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
    several = f"{plural(len(blocks), 'block')}, first {blocks[0]}"
    where = several if len(blocks) > 1 else f"block {blocks[0]}"
    if count == 0:
        return f"^ no server: {where}"
    return f"^ thinnest, {plural(count, 'server')}: {where}"

"""The reference of arguments of ``from_pretrained`` that have no effect or are refused."""

from petals.client.load_options import REFUSED, WITHOUT_EFFECT
from petals_docs.markdown import code, table


def render() -> str:
    """One row for each argument."""
    refused = [(code(name), "refused", *why) for name, why in REFUSED.items()]
    ignored = [(code(name), "without effect", why, "") for name, why in WITHOUT_EFFECT.items()]
    rows = sorted(refused + ignored)
    return table(("argument of transformers", "here", "why", "instead"), rows)

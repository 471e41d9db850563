"""An import path of the original before version 2.0; what it names is in ``utils.dht``."""

from petals.utils.dht import compute_spans, declare_active_modules, get_remote_module_infos

__all__ = ["compute_spans", "declare_active_modules", "get_remote_module_infos"]

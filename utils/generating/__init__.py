"""One generation: what was asked for, its DiTs, what it writes."""

"""Ops: the unit of portability. One file a family; each op carries its body, cases and tolerance."""

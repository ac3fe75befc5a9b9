"""Smaller forms of one model: pruning, int8, low rank, sharing, clustering."""

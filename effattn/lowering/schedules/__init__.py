"""Tile sizes, warps and stages by device, dtype and head_dim."""

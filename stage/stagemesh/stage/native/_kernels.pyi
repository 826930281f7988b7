"""The compiled module; tensors are addresses of contiguous float32 memory unless said otherwise."""

def is_supported() -> bool:
    """Whether this CPU has the instructions."""

def turn(blocks: int, panels: int, num_panels: int, in_features: int, threads: int) -> None:
    """[panels, 32, in] to [panels, in, 32]."""

def linear(
    x: int, weight: int, residual: int, y: int, rows: int, in_features: int, out_features: int, threads: int
) -> None:
    """y = x W^T (+ residual, unless 0) for a weight in panels."""

def halves(
    shape: bytes,
    layers: bytes,
    begin: int,
    end: int,
    x: int,
    rows: int,
    add_residual: int,
    positions: int,
    tables: int,
    table_width: int,
    longest: int,
    cos: int,
    sin: int,
) -> None:
    """Halves [begin, end) of decoder layers (attention, MLP, attention, ...) over rows of one token, x in place."""

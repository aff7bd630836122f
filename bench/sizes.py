"""What the benchmark's models are in numbers; servers by hand read them without torch."""

# Of a chunk.
FRAMES = 10
# Features in, hidden size. A and B are bidirectional; U is what A is without its backward direction.
SIZES = {"A": (80, 128), "B": (512, 256), "U": (80, 128)}
COMPARED = ("A", "B")

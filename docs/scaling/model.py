"""The table of docs/SCALING.md: what several GPUs are predicted to do, from what one and two were measured to do.

python3 docs/scaling/model.py
"""

# One H100 80GB HBM3, 100.7 M parameters, 2048 x 32 tokens a micro-batch: ms of a micro-batch with its update, by one process.
MICRO = {"dense": 65_536 / 545_946 * 1e3, "dash": 65_536 / 405_899 * 1e3}
# The same with two micro-batches over two processes: the difference is what exchange and sum take.
TWO = {"dense": 2 * 65_536 / 1_055_413 * 1e3, "dash": 2 * 65_536 / 782_554 * 1e3}
GRADIENT = 100.7e6 * 4
LATENCY = 0.05  # ms of an exchange of nothing (examples/exchange.rs)
NETWORK = 50.0  # GB/s a GPU between hosts: one port of 400 Gbit/s each, by its data sheet; not measured


def out(world, share=1.0):
    """GB that a process sends in an update: gradients to their owners, weights to all others."""
    return 2 * (world - 1) / world * GRADIENT / 1e9 * share


def cost(kind, world, hosts=1):
    """ms of exchange and sum in an update."""
    measured = TWO[kind] - MICRO[kind]
    inside = out(2) / (measured - 3 * LATENCY)  # GB a ms, as an update reaches it
    time = 3 * LATENCY + out(world) / inside
    if hosts > 1:
        across = out(world) * (world - world // hosts) / (world - 1)
        time += across / NETWORK * 1e3
    return time


print("| processes | hosts | micro-batches | dense, times one | dash, times one |")
print("|---|---|---|---|---|")
for world, hosts in [(2, 1), (4, 1), (8, 1), (16, 2), (64, 8)]:
    for each in (1, 4):
        row = []
        for kind in ("dense", "dash"):
            alone = world * each * MICRO[kind]
            row.append(alone / (each * MICRO[kind] + cost(kind, world, hosts)))
        print(f"| {world} | {hosts} | {world * each} | {row[0]:.2f} | {row[1]:.2f} |")

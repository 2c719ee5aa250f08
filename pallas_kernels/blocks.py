"""How much of a weight a kernel takes at once: one table for each platform, by chip and shape.

Notation: M rows of activations, N outputs, K contracted.
"""

# The TPU decode kernel's rows: up to 8 it waits for memory on every chip; 16 cost half as many more bundles.
ROWS = (8, 16)

# Of K: kernel tiles, in multiples of 256 (two halves of what the matrix unit contracts). Large tiles keep the cost of a grid step
# (about 0.35 us) under that of the memory read (0.7 us for 2048 x 1024 weights on a v6e).
TPU_TILES = (2048, 1792, 1536, 1280, 1024)
TPU_BLOCKS_N = (1024, 512, 256)
TPU_STEPS = 8  # at least, so that reading the first block, which nothing hides, is a small part


def tpu_tile(k: int) -> int:
    """Return the kernel tile along K that needs the least padding, the largest of those; two where one would hold all of K."""
    if k <= TPU_TILES[0]:
        return k // 2 if k > TPU_TILES[-1] and k % 512 == 0 else k + -k % 256
    return min(TPU_TILES, key=lambda tile: -k % tile)


def tpu_block_n(n: int, tiles: int) -> int:
    """Return how many outputs the TPU kernels compute at once: as many as leave `TPU_STEPS` steps of the grid."""
    whole = n + -n % 128
    fitting = [block for block in TPU_BLOCKS_N if -(-n // block) * tiles >= TPU_STEPS]
    return min(whole, fitting[0] if fitting else TPU_BLOCKS_N[-1])


TPU_ROWS_BYTES = 2**22  # of a plain weight at once, at most


def tpu_rows(n: int, k: int) -> int:
    """Return how many rows of plain weights [n, k] a TPU kernel takes at once: a part of n in whole 16s, or 0 where none fits."""
    most = max(TPU_ROWS_BYTES // (2 * k), 16)
    return max((rows for rows in range(16, min(n, most) + 1, 16) if n % rows == 0), default=0)


# Outputs of a program, warps and pipeline stages of the GPU kernel by chip, and how many programs keep its memory busy: nearly four
# for each of its processors (A100 has 108, L4 58, H200 132). Measured on an H200 alone.
GPU_BLOCKS = {"sm_80": (64, 2, 4, 400), "sm_89": (64, 2, 3, 215), "sm_90": (64, 2, 4, 490)}
GPU_DEFAULT = "sm_90"
GPU_SMALL = 16, 1  # outputs and warps of a program of a weight that makes fewer than GPU_FEW programs of the size above
GPU_FEW = 128
GPU_CHUNKS = 2  # at least, that a program goes through
GPU_EXPERT_PARTS = 4  # of K at most, where the sums of all that rows chose are added up


def gpu_blocks(chip: str, n: int, chunks: int, most: int | None = None) -> tuple[int, int, int, int]:
    """Return (outputs of a program, parts of K, warps, stages): K is split where the outputs alone are too few programs.

    At most so many parts, if that is given.
    """
    block, warps, stages, programs = GPU_BLOCKS.get(chip, GPU_BLOCKS[GPU_DEFAULT])
    splits = 1
    while n // block * splits < programs and chunks // (2 * splits) >= GPU_CHUNKS and splits != most:
        splits *= 2
    if n // block * splits < GPU_FEW:
        block, warps = GPU_SMALL
    return block, splits, warps, stages

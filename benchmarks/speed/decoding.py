"""What the workers of `bench_encode.py` do beside the measured work; light, since each of them imports it anew."""

from ehrseq.data.shards import Shard, read_blocks


def decode(task: tuple[Shard, tuple[str, ...]]) -> int:
    """Read the columns of a file and do nothing with them."""
    shard, columns = task
    return sum(block.height for block in read_blocks(shard, columns=columns))


def nothing(_: int) -> None:
    """What workers cost that do nothing."""

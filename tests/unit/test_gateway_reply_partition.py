"""Which partitions of `replies` a gateway reads after it has moved to another one."""

from services.gateway.reply_partition import LEAVE_S, ReadPartitions


class Wall:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def test_an_older_partition_is_read_until_no_request_waits_that_may_have_named_it() -> None:
    wall = Wall()
    partitions = ReadPartitions(now_s=wall)
    assert partitions.all == set()
    partitions.move(3)
    partitions.leave(set())
    assert partitions.all == {3}
    partitions.move(5)
    partitions.leave(set())  # a request that names 3 may not be published yet
    assert (partitions.current, partitions.all) == (5, {3, 5})
    wall.s = LEAVE_S
    partitions.leave({"a", "b"})
    partitions.leave({"b", "c"})  # c has named 5
    assert partitions.all == {3, 5}
    partitions.leave({"c"})
    assert partitions.all == {5}


def test_a_gateway_may_move_several_times_and_back() -> None:
    wall = Wall()
    partitions = ReadPartitions(now_s=wall)
    for number in (1, 2, 3, 2):
        partitions.move(number)
    assert (partitions.current, partitions.all) == (2, {1, 2, 3})
    wall.s = LEAVE_S
    partitions.leave(set())
    assert partitions.all == {2}
    partitions.move(2)
    assert partitions.all == {2}

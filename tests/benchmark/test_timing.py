import pytest

from crossmae_det.benchmark.measuring import Spread, interleaved, ratios


def test_measurements_are_taken_in_turns_and_the_first_round_is_dropped():
    taken = []

    def measure(name):
        taken.append(name)
        return f"{name}{len(taken)}"

    results = interleaved([lambda: measure("a"), lambda: measure("b")], 2, "letters")
    assert taken == ["a", "b"] * 3
    assert results == [["a3", "a5"], ["b4", "b6"]]


@pytest.mark.parametrize("repeats", [0, -1])
def test_repeats_must_be_positive(repeats):
    with pytest.raises(ValueError, match=f"repeats must be at least 1, got {repeats}"):
        interleaved([lambda: 1], repeats, "")


def test_spread_and_ratios():
    assert Spread.of([4.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=4.0)
    assert str(Spread(2.0, 1.0, 4.0)) == "2.000 (1.000 to 4.000)"
    # Round by round: a machine that is three times as slow in one leaves the ratio as it is.
    assert ratios([2.0, 6.0], [4.0, 12.0]) == Spread(0.5, 0.5, 0.5)

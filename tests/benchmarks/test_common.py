"""The small parts of the benchmarks: what their figures mean. No time is asserted."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.common import Ratio, Seconds, add_output_options, compare, publish, ratio_of, take_turns


def test_a_ratio_is_the_median_of_pairs_with_the_middle_half_around_it() -> None:
    assert ratio_of([2.0, 6.0, 4.0, 8.0, 10.0], [2.0] * 5) == Ratio(3.0, 2.0, 4.0, 5)
    assert ratio_of([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5, 1)


def test_a_slow_spell_that_meets_both_sides_leaves_the_ratio_alone() -> None:
    assert ratio_of([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == Ratio(2.0, 2.0, 2.0, 3)


def test_sides_of_unequal_length_or_without_a_turn_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio_of([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="numerators"):
        ratio_of([], [])


def test_contenders_take_turns_and_the_warm_up_is_not_counted() -> None:
    order: list[str] = []
    work = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    taken = take_turns(work, rounds=2, warm_up_rounds=1)
    assert order == ["a", "b"] * 3
    assert {name: len(turns) for name, turns in taken.items()} == {"a": 2, "b": 2}


def test_a_comparison_says_how_many_times_faster_by_each_clock() -> None:
    taken = {"peer": [Seconds(3.0, 4.0)] * 2, "ours": [Seconds(2.0, 1.0)] * 2}
    found = compare(taken, slow="peer", fast="ours")
    assert {name: ratio.median for name, ratio in found.items()} == {
        "ours_over_peer_cpu": 1.5,
        "ours_over_peer_wall": 4.0,
    }


def test_numbers_are_published_as_json_and_kept_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_output_options(parser)
    told = parser.parse_args(["--json", "--out", str(tmp_path / "numbers.json")])
    publish({"speed": ratio_of([3.0], [2.0]), "batch": 8}, told)
    wanted = {"speed": {"median": 1.5, "low": 1.5, "high": 1.5, "pairs": 1}, "batch": 8}
    assert json.loads(capsys.readouterr().out) == wanted
    assert json.loads((tmp_path / "numbers.json").read_text()) == wanted

"""Seeds made of names: distinct, 63 bits, and the same ones for ever."""

from blip3o_fast.seeds import sample_seed, stream_seed


def test_streams_differ():
    seeds = {stream_seed(a, b) for a in range(20) for b in range(-1, 20)}
    assert len(seeds) == 20 * 21 and all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_of_the_sample_alone():
    seeds = {sample_seed(f"k{i}", 0) for i in range(100)}
    assert len(seeds) == 100 and sample_seed("k0", 0) != sample_seed("k0", 1)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_resumed_runs_and_continued_folders_draw_what_they_drew():
    assert stream_seed(3, 7, -1) == 7742752377586965455
    assert sample_seed("photo_1#0.2m", 5) == 2661735063860035485

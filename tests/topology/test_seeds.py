from __future__ import annotations

import torch

from sparsekern.topology import generator_for


def first(*names: str | int) -> int:
    return int(torch.randint(2**62, (), generator=generator_for(*names)))  # type: ignore[arg-type]


def test_the_same_seed_and_names_give_the_same_numbers() -> None:
    assert torch.equal(
        torch.randn(5, generator=generator_for(7, "fc")), torch.randn(5, generator=generator_for(7, "fc"))
    )


def test_numbers_never_change_between_releases() -> None:
    """A topology is drawn from its seed on every rank, whatever version it runs.

    The bytes are the first 8 of ``printf "(0, 'fc1', 'topology')" | sha256sum``.
    """
    assert (
        generator_for(0, "fc1", "topology").initial_seed()
        == int.from_bytes(bytes.fromhex("20b8f734f44f510d"), "little") >> 1
    )
    assert generator_for(1).initial_seed() == int.from_bytes(bytes.fromhex("28cb03b06c288e88"), "little") >> 1


def test_seed_names_and_their_order_all_matter() -> None:
    numbers = [
        first(0, "a"),
        first(1, "a"),
        first(0, "b"),
        first(0, "a", "b"),
        first(0, "a/b"),
        first(0, "a', 'b"),
        first(0, "b", "a"),
        first(0, "a", 1),
        first(0),
    ]

    assert len(set(numbers)) == len(numbers)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    state = torch.get_rng_state()
    number = first(0, "a")
    assert torch.equal(torch.get_rng_state(), state)

    torch.manual_seed(123)
    assert first(0, "a") == number
    torch.set_rng_state(state)


def test_the_generator_is_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        generator = generator_for(0, "a")

    assert generator.device == torch.device("cpu")


def test_a_seed_of_another_integer_type_is_the_same_seed() -> None:
    assert first(torch.tensor(7), "a") == first(7, "a") == first(True + 6, "a")  # type: ignore[arg-type]

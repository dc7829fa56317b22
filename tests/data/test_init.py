import pytest

from cnf import data
from cnf.data import density, digits, idx, table


def test_every_public_name_is_found_in_the_package_and_listed():
    homes = {
        density: ["TOY_NAMES", "toy"],
        digits: ["bits_per_dim", "dequantize", "load_digits"],
        idx: ["Images", "mnist"],
        table: ["Table", "read_table", "write_table"],
    }
    for home, names in homes.items():
        assert all(getattr(data, name) is getattr(home, name) for name in names)
        assert set(names) <= set(dir(data))


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match=r"'cnf\.data' has no attribute 'moons'"):
        _ = data.moons

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_wine

from cnf.data import rows as rows_module
from cnf.data.rows import as_rows, constant_columns, repeated_columns

ROWS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


@pytest.mark.parametrize(
    "x",
    [
        ROWS,
        tuple(map(tuple, ROWS)),
        np.array(ROWS),
        np.array(ROWS, dtype=np.int64),
        np.array(ROWS, dtype=np.float16),
        np.array(ROWS, dtype=">f8"),
        np.array(ROWS).T.copy().T,
        np.array(ROWS)[::-1][::-1],
        np.ma.array(ROWS),
        np.array(ROWS, dtype=np.longdouble),
        torch.tensor(ROWS),
        torch.tensor(ROWS).long(),
        torch.tensor(ROWS, dtype=torch.float64),
        torch.tensor(ROWS).bfloat16(),
        torch.tensor(ROWS, dtype=torch.uint16),
        torch.tensor(ROWS).to(torch.float8_e4m3fn),
        [torch.tensor(row) for row in ROWS],
        pd.DataFrame(ROWS),
        pd.DataFrame(ROWS, columns=["a", "a"]),
        pd.DataFrame(ROWS).convert_dtypes(),
        pd.DataFrame({"a": [1, 3, 5], "b": pd.array([2.0, 4.0, 6.0], dtype="Float32")}),
        pd.DataFrame({"a": [1, 3, 5], "b": pd.Series([2, 4, 6], dtype=object)}),
    ],
    ids=lambda x: type(x).__name__,
)
def test_rows_come_from_everything_that_holds_them(x):
    rows = as_rows(x, 2)
    assert rows.dtype == torch.get_default_dtype() and rows.tolist() == ROWS


def test_a_read_only_map_is_copied_and_a_fitting_tensor_is_not(tmp_path):
    np.save(tmp_path / "rows.npy", np.array(ROWS, dtype=np.float32))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    as_rows(mapped).add_(1)  # would end the process if it wrote to the map
    assert mapped[0, 0] == 1
    x = torch.tensor(ROWS)
    assert as_rows(x) is x


def test_rows_have_the_dtype_asked_for():
    assert as_rows(np.array(ROWS), dtype=torch.float64).dtype == torch.float64
    value = 0.1 + 2**-50
    assert as_rows([[value]], dtype=torch.float64).item() == value
    assert as_rows(torch.tensor([[2**53 - 1]]), dtype=torch.float64).item() == 2**53 - 1


def test_rows_keep_their_gradient():
    x = torch.tensor(ROWS, dtype=torch.float64, requires_grad=True)
    as_rows(x * 2, 2).sum().backward()
    assert x.grad is not None and (x.grad == 2).all()


def test_one_dimension_is_a_column_only_where_one_column_is_expected():
    assert as_rows([1.0, 2.0], 1).shape == (2, 1)
    assert as_rows(pd.Series([1.0, 2.0]), 1).shape == (2, 1)


@pytest.mark.parametrize(
    "shape, dim, words",
    [
        ((5,), 2, ["shape (5,), expected (n, 2)", "x.reshape(1, -1) for one row"]),
        ((5,), None, ["expected (n, dim)", "x.reshape(-1, 1) for one column"]),
        ((), 2, ["shape ()", "reshape"]),
        ((2, 3, 4), 4, ["(2, 3, 4)", "reshape"]),
        ((3, 500), 3, ["has shape (3, 500), expected (n, 3); transpose it with x.T"]),
        ((7, 500), 3, ["has shape (7, 500), expected (n, 3); pass 3 columns"]),
        ((0, 3), 3, ["empty"]),
        ((3, 0), None, ["empty"]),
        ((0,), 1, ["empty"]),
    ],
)
@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_a_wrong_shape_is_told_with_its_remedy(sentence, make, shape, dim, words):
    sentence(as_rows, make(shape), dim, words=words)


def test_errors_call_the_rows_by_their_name(sentence):
    assert sentence(as_rows, [1.0], 2, name="context").startswith("context has shape (1,)")


@pytest.mark.parametrize(
    "x, words",
    [
        ([[1.0, np.nan], [1, 2], [np.inf, 3]], ["in 2 rows (rows 0, 2,", "columns '0', '1'"]),
        (torch.tensor([[1.0, torch.nan]]), ["in 1 row (row 0,", "column '1'"]),
        (torch.tensor([[torch.inf]], requires_grad=True), ["row 0"]),
        (pd.DataFrame({"a": [1.0], "b": [np.nan]}), ["column 'b'"]),
        (np.ma.array([[1.0, 2.0]], mask=[[False, True]]), ["missing", "column '1'"]),
        (np.array([[1, 1e31]]), ["beyond ±1e+30", "column '1'", "rescale"]),
        (torch.tensor([[1, 1e30]]), ["beyond ±1e+30", "row 0", "column '1'"]),  # a bit beyond it
        (torch.tensor([[1, -1e31]]), ["beyond ±1e+30", "column '1'"]),
        (np.array([[1j]]), ["complex", "imaginary part as two columns"]),
        (torch.tensor([[1j]]), ["complex"]),
        (np.array([[1.0]], dtype=object), ["Python objects", ".astype(float)"]),
        (np.array([["a"]]), ["text"]),
        ([["a", 1]], ["text"]),
        ("abc", ["text"]),
        (b"abc", ["bytes"]),
        (np.array([["2020-01-01"]], dtype="M8[D]"), ["dates"]),
        (np.zeros((2, 1), dtype=[("a", float)]), ["records"]),
        (None, ["Python objects"]),
        ({"a": [1]}, ["Python objects"]),
        (object(), ["Python objects"]),
        (3.0, ["shape ()"]),
        ([], ["empty"]),
        ([[]], ["empty"]),
        ([[1, 2], [3]], ["rows of unequal length"]),
        ([torch.tensor([1.0], requires_grad=True)], ["a list of no known kind", "a tensor"]),
        ([[10**400]], ["Python objects"]),
        (torch.eye(2).to_sparse(), ["no plain tensor", "to_dense"]),
        (torch.eye(2, device="meta"), ["no plain tensor"]),
        (
            pd.DataFrame({"a": [1.0, 2.0], "kind": ["x", "y"]}),
            ["column 'kind' of x has 'x' in row 0"],
        ),
        (pd.DataFrame({"a": [1.0, 2.0], "n": ["1", "2"]}), ["column 'n' of x has '1' in row 0"]),
        (pd.DataFrame({"a": [1], "t": pd.to_datetime(["2020-01-01"])}), ["column 't'"]),
        (pd.DataFrame({"t": pd.to_datetime(["2020-01-01"])}), ["column 't'"]),
        (pd.DataFrame({"t": pd.to_timedelta([1], unit="D")}), ["column 't'"]),
        (pd.DataFrame({"a": [1], "b": [1j]}), ["complex"]),
        (pd.DataFrame({"a": [True], "b": [1j]}), ["column 'b'"]),
        (pd.DataFrame({"a": [1.0, 2.0], "b": pd.Series([1, None], dtype=object)}), ["column 'b'"]),
        (
            pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "b": [True, False]}),
            ["column 'a'"],
        ),
        (pd.DataFrame(), ["empty"]),
    ],
)
def test_what_is_no_row_of_numbers_is_a_sentence(sentence, x, words):
    sentence(as_rows, x, words=words)


def test_values_are_searched_block_by_block(sentence, monkeypatch):
    monkeypatch.setattr(rows_module, "BLOCK", 6)
    x = np.zeros((50, 3))
    x[[4, 17, 30, 49], 1] = np.nan
    sentence(as_rows, x, words=["in 4 rows (rows 4, 17, 30, counted from 0, …), column '1'"])


class Stranger:
    """Something that breaks when asked for its numbers."""

    columns = property(lambda self: 1 / 0)

    def __array__(self, dtype=None, copy=None):
        raise KeyError("no numbers today")


def test_a_stranger_that_breaks_is_a_sentence(sentence):
    assert "a Stranger of no known kind" in sentence(as_rows, Stranger())


def test_the_limit_is_that_of_the_dtype(sentence):
    assert as_rows([[1e200]], dtype=torch.float64).item() == 1e200
    assert "beyond ±6.55e+04" in sentence(as_rows, [[1e5]], dtype=torch.float16)


@pytest.mark.parametrize(
    "keywords, words",
    [
        ({"dtype": torch.int64}, ["dtype is 'torch.int64'", "torch.float32"]),
        ({"dtype": torch.complex64}, ["torch.complex64"]),
        ({"dtype": "float32"}, ["'float32'"]),
        ({"device": "nowhere"}, ["device 'nowhere'", "use device='cpu'"]),
        ({"device": "cuda:99"}, ["device 'cuda:99'"]),
        ({"device": [1]}, ["device '[1]'"]),
    ],
)
def test_a_dtype_or_device_that_cannot_be_is_a_sentence(sentence, keywords, words):
    sentence(as_rows, ROWS, **keywords, words=words)


# What has no density ------------------------------------------------------------------------


def test_columns_without_a_density_are_found():
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=1000)
    columns = {
        "smooth": smooth,
        "rounded": smooth.round(1),
        "counts": rng.permutation(1000).astype(float),  # all distinct, and whole
        "zeros": np.where(rng.random(1000) < 0.2, 0.0, smooth),
        "constant": np.full(1000, 0.5),
        "slightly rounded": smooth.round(4),
    }
    values = np.stack(list(columns.values()), axis=1)
    assert repeated_columns(values) == [1, 2, 3, 4]
    assert repeated_columns(torch.tensor(values)) == [1, 2, 3, 4]
    assert constant_columns(values) == [4]


def test_a_few_whole_numbers_are_no_evidence():
    assert repeated_columns([[float(i)] for i in range(19)]) == []
    assert repeated_columns([[float(i)] for i in range(20)]) == [0]


def test_only_the_first_rows_are_looked_at_for_repetitions(monkeypatch):
    monkeypatch.setattr(rows_module, "REPEATED_ROWS", 30)
    values = np.concatenate([np.random.default_rng(0).random(30), np.zeros(1000)])
    assert repeated_columns(values) == []


def test_the_columns_of_wine_that_are_counts_are_found():
    data = load_wine()
    found = {data.feature_names[i] for i in repeated_columns(data.data)}
    assert {"magnesium", "proline", "nonflavanoid_phenols"} <= found
    assert not found & {"alcohol", "flavanoids", "malic_acid"}
    assert constant_columns(data.data) == []


@pytest.mark.parametrize("search", [repeated_columns, constant_columns])
def test_searches_take_empty_odd_and_wrong_values(sentence, search):
    assert search(np.zeros((0, 3))) == [] and search(np.zeros((3, 0))) == []
    assert search(np.array([[np.nan], [1.0]])) == [] and search(np.array([[np.inf], [1.0]])) == []
    assert search(np.array([True, True, True])) == [0]
    assert "shape" in sentence(search, np.zeros((2, 2, 2)))
    assert "text" in sentence(search, [["a"]])

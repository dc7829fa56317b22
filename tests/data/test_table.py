import io
import os
import stat
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.datasets import load_breast_cancer, load_wine

from cnf.data.table import Table, read_table, write_table
from cnf.error import InputError

ROWS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
A_FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def file(tmp_path):
    """Writes one file of the given content and returns its path."""
    return lambda content, name="t.csv": written(tmp_path / name, content)


@pytest.fixture
def saved(tmp_path):
    """Saves one array and returns its path."""

    def save(array, name="t.npy"):
        np.save(tmp_path / name, array)
        return tmp_path / name

    return save


# .csv ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "a,b\n1,2\n3.5,-4e2\n",
        "a,b\r\n1,2\r\n3.5,-4e2\r\n",
        "a,b\r1,2\r3.5,-4e2",
        "a;b\n1;2\n3.5;-4e2\n\n\n",
        "a\tb\n1\t2\n3.5\t-4e2\n  \n",
        "\ufeffa,b\n1,2\n3.5,-4e2",
        '\ufeff"a","b"\n"1","2"\n"3.5","-4e2"\n',
        "# a, b\n 1, 2\n 3.5 , -4e2\n",
        "\n\na,b\n1,2\n3.5,-4e2\n",
    ],
)
def test_a_csv_is_read_in_all_its_dialects(file, content):
    table = read_table(file(content))
    assert isinstance(table, Table)
    assert table.columns == ("a", "b")
    assert table.values.dtype == np.float64
    assert table.values.tolist() == [[1, 2], [3.5, -400]]


def test_a_csv_without_a_header_counts_its_columns(file):
    table = read_table(file("1,2,3\n4,5,6\n"))
    assert table.columns == ("0", "1", "2") and table.values.shape == (2, 3)


@pytest.mark.parametrize(
    "content, columns",
    [
        ("0,1,2\n0.5,1.5,2.5\n", ("0", "1", "2")),  # pandas' names
        (",0,1\n0,0.5,1.5\n1,2.5,3.5\n", ("unnamed 0", "0", "1")),  # and its index
        ('"a,b";c\n1;2\n', ("a,b", "c")),
        ("a;b,c;d\n1;2;3\n", ("a", "b,c", "d")),
        ("größe\n1\n", ("größe",)),
    ],
)
def test_headers_are_told_from_data(file, content, columns):
    assert read_table(file(content)).columns == columns


@pytest.mark.parametrize(
    "content, rows",
    [
        ("0,1,2\n1,2,3\n", 2),
        ("0,1\n0.5,0.7\n", 2),
        ("0\n0.5\n", 2),
        ("0,1,2\n", 1),
        ("5\n", 1),
    ],
)
def test_numbers_that_may_be_data_are_data(file, content, rows):
    assert len(read_table(file(content)).values) == rows


def test_a_csv_of_labelled_rows_without_a_header_can_be_chosen_from(sentence, file):
    path = file("5.1,3.5,setosa\n4.9,3.0,virginica\n")
    assert read_table(path, ["0", "1"]).values.tolist() == [[5.1, 3.5], [4.9, 3.0]]
    message = sentence(read_table, path)
    assert message == (
        f"column '2' of {path} is not numeric, line 1 has 'setosa'; "
        "choose numeric columns with --columns, on this line '0', '1'"
    )


def test_a_first_line_of_names_and_numbers_is_not_guessed_at(sentence, file):
    message = sentence(read_table, file("150,4,setosa\n5.1,3.5,0.2\n"))
    assert "line 1" in message and "'setosa'" in message and "neither a header nor data" in message


@pytest.mark.parametrize(
    "choice, columns",
    [
        (["b"], ("b",)),
        (["c", "a"], ("c", "a")),
        ([2, 0], ("c", "a")),
        (["2", "b"], ("c", "b")),
        ([np.int64(1)], ("b",)),
        (("a", "b", "c"), ("a", "b", "c")),
    ],
)
def test_columns_are_chosen_by_name_or_index_in_the_order_asked_for(file, choice, columns):
    table = read_table(file("a,b,c\n0.1,1.1,2.1\n0.2,1.2,2.2\n"), choice)
    assert table.columns == columns
    assert table.values[0].tolist() == ["abc".index(name) + 0.1 for name in columns]


def test_a_name_comes_before_an_index(file):
    assert read_table(file(",0,1\n7,0.5,1.5\n"), ["0"]).values.tolist() == [[0.5]]


def test_only_the_chosen_columns_have_to_be_numbers(file):
    path = file("name,age,gap\nAnn,31,\nBo,54,nan\n")
    assert read_table(path, ["age"]).values.tolist() == [[31], [54]]


@pytest.mark.parametrize(
    "choice, words",
    [
        (["widht"], ["no column 'widht'", "'width', 'depth'", "did you mean 'width'"]),
        (["zzz"], ["no column 'zzz'", "choose among them"]),
        ([7], ["no column '7'"]),
        ([-1], ["no column '-1'"]),
        (["9" * 5000], ["no column"]),
        ([None], ["no column 'None'"]),
        (["depth", "1"], ["'depth'", "chosen twice"]),
        ([], ["empty list"]),
        ("width", ["a single value", "['width']"]),
        (3, ["a single value"]),
    ],
)
def test_columns_that_cannot_be_chosen_are_named(sentence, file, choice, words):
    sentence(read_table, file("width,depth\n1,2\n"), choice, words=words)


def test_a_name_that_occurs_twice_cannot_be_chosen(sentence, file):
    path = file("a,a,b\n1,2,3\n")
    assert "2 columns named 'a'; choose by index, the first is 0" in sentence(
        read_table, path, ["a"]
    )
    assert read_table(path, [1]).values.tolist() == [[2]]


def test_long_lists_of_columns_are_cut(sentence, file):
    names = ",".join(f"c{i}" for i in range(500))
    path = file(names + "\n" + ",".join(["1"] * 500))
    assert "'c9', … (500 in all)" in sentence(read_table, path, ["zz"])


@pytest.mark.parametrize(
    "content, words",
    [
        ("", ["is empty (0 bytes)"]),
        ("\n \n\n", ["nothing but blank lines"]),
        ("\ufeff", ["nothing but blank lines"]),
        ("a,b\n", ["a header and no rows"]),
        ("a,b\n\n\n", ["a header and no rows"]),
        ("a,b\n1,2\n3\n", ["line 3", "1 value where 2 are expected"]),
        ("a,b\n1,2,3\n", ["line 2", "3 values where 2 are expected"]),
        ("1\n2\n3,4\n", ["line 3", "2 values where 1 is expected"]),
        ("a,b\n1,2\n\n3,4\n", ["line 3", "is blank"]),
        ("a,b\n1,2\n3,x.5\n", ["column 'b'", "line 3 has 'x.5'", "'a'"]),
        ("a\n1_000\n", ["column 'a'", "line 2 has '1_000'"]),
        ("a;b\n1,5;2,5\n", ["column 'a'", "line 2 has '1,5'", "decimals with a point"]),
        ("1.0 2.0\n3.0 4.0\n", ["separate the values of a line with commas"]),
        (
            "a,b\n1,2\n3,\n4,NA\n,?\n5,6\n7,null\n",
            ["in 4 rows (lines 3, 4, 5, …)", "columns 'a', 'b'", "missing"],
        ),
        ("a,b\n1,2\n3,inf\n", ["in 1 row (line 3)", "column 'b'"]),
        ("a,b\n1,1e999\n", ["in 1 row (line 2)", "column 'b'"]),
        ("a,b\n1,2\n-1e31,2\n", ["beyond ±1e+30", "(line 3)", "column 'a'", "rescale"]),
        ('a,b\n1,"2\n3,4\n', ["line 3", "a quote that is not closed"]),
        ('a,b\n1,"2"3\n', ["line 2", "cannot be split"]),
        ("a\n" + "1" * 200_000 + "\n", ["line 2", "field larger than field limit"]),
        (b"a,b\n1,2\n3,\xe9\n", ["line 3", "not UTF-8", "0xe9"]),
        ("a,b\n1,2\n".encode("utf-16"), ["line 1", "not UTF-8", "0xff"]),
        (b"a\x00,b\n1,2\x00\n", ["column 'b'", "line 2"]),
        (b"\x89PNG\r\n\x1a\n", ["not UTF-8"]),
    ],
)
def test_a_broken_csv_ends_in_a_sentence_with_its_place(sentence, file, content, words):
    path = file(content)
    sentence(read_table, path, words=[str(path), *words])


def test_lines_are_counted_in_the_file_not_in_the_table(sentence, file):
    assert "line 5" in sentence(read_table, file('"a\nb",c\n"1\n",2\n3,x\n'))


def read_or_refuse(path):
    try:
        table = read_table(path)
    except InputError as error:
        assert str(error).isprintable()
    else:
        assert np.isfinite(table.values).all() and len(table.columns) == table.values.shape[1]


TEXT = st.text(alphabet='ab01.,;\t"\n\r -e_\x00é#', max_size=60).map(str.encode)


@given(TEXT | st.binary(max_size=200), st.sampled_from([".csv", ".csv", ".npy", ".npz"]))
@A_FEW
def test_any_bytes_are_read_or_refused_in_a_sentence(tmp_path, content, suffix):
    read_or_refuse(written(tmp_path / f"fuzz{suffix}", content))


@given(st.data())
@A_FEW
def test_any_damage_to_an_array_file_is_read_or_refused_in_a_sentence(tmp_path, data):
    content = bytearray(data.draw(st.sampled_from([_npy(), _npz()])))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    suffix = data.draw(st.sampled_from([".npy", ".npz"]))
    read_or_refuse(written(tmp_path / f"fuzz{suffix}", bytes(content)))


def _npy(array=((1.0, 2.0), (3.0, 4.0))) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(array))
    return buffer.getvalue()


def _npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **(arrays or {"x": np.eye(3)}))
    return buffer.getvalue()


# Files that are no table --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, words",
    [
        ("missing.csv", ["no file", "missing.csv"]),
        ("none/missing.csv", ["no file"]),
        (".", ["is a folder"]),
        ("t.xlsx", ["'.xlsx'", ".csv, .npy, .npz"]),
        ("t", ["no suffix", ".csv, .npy, .npz"]),
        ("x" * 300 + ".csv", ["cannot be read"]),
        ("a\0b.csv", ["cannot be read", "null"]),
        ("t.xlsx/t.csv", ["cannot be read"]),
    ],
)
def test_a_path_that_leads_to_no_table_is_a_sentence(tmp_path, name, words):
    for other in ("t.xlsx", "t"):
        (tmp_path / other).write_text("1,2\n")
    with pytest.raises(InputError) as refusal:
        read_table(str(tmp_path / name))
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize("path", [None, 3.5, b"t.csv", ["t.csv"]])
def test_what_is_no_path_is_a_sentence(sentence, path):
    assert "cannot be read" in sentence(read_table, path)
    assert "no path to write to" in sentence(write_table, path, [[1.0]])


def test_suffixes_may_be_in_capitals(file):
    assert read_table(file("1,2\n", "T.CSV")).values.tolist() == [[1, 2]]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_not_waited_for(sentence, tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    assert "no regular file" in sentence(read_table, tmp_path / "pipe.csv")


# .npy and .npz ------------------------------------------------------------------------------


def test_an_npy_file_is_mapped_not_copied(saved):
    array = np.random.default_rng(0).normal(size=(5, 3))
    table = read_table(saved(array))
    assert isinstance(table.values, np.memmap) and not table.values.flags.writeable
    assert np.array_equal(table.values, array) and table.columns == ("0", "1", "2")


@pytest.mark.parametrize("choice", [["1"], ["0", "2"], [1, 2]])
def test_evenly_spaced_columns_stay_mapped(saved, choice):
    array = np.arange(12.0).reshape(4, 3)
    table = read_table(saved(array), choice)
    assert isinstance(table.values, np.memmap) and not table.values.flags.owndata
    assert np.array_equal(table.values, array[:, [int(i) for i in choice]])
    assert table.columns == tuple(map(str, choice))


def test_columns_in_another_order_are_copied(sentence, saved):
    array = np.arange(12.0).reshape(4, 3)
    assert np.array_equal(read_table(saved(array), [2, 0]).values, array[:, [2, 0]])
    assert "no column '3'" in sentence(read_table, saved(array), [3])


@pytest.mark.parametrize(
    "given_, expected",
    [
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.float16, np.float32),
        (">f8", np.float64),
        (">f4", np.float32),
        (np.longdouble, np.float64),
        (bool, np.float32),
        (np.uint8, np.float32),
        (np.int16, np.float32),
        (np.int64, np.float64),
        (">i4", np.float64),
        (np.uint64, np.float64),
    ],
)
def test_numbers_of_every_kind_become_floats(saved, given_, expected):
    values = read_table(saved(np.array([[0, 1], [1, 1]], dtype=given_))).values
    assert values.dtype == expected and values.dtype.isnative
    assert values.tolist() == [[0, 1], [1, 1]]
    torch.from_numpy(values.copy())


def test_one_dimension_is_one_column_and_column_order_does_not_matter(saved):
    table = read_table(saved(np.arange(4.0)))
    assert table.values.shape == (4, 1) and isinstance(table.values, np.memmap)
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert np.array_equal(read_table(saved(array)).values, array)


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((2, 3, 4)), ["(2, 3, 4)", "reshape"]),
        (np.float64(3), ["shape ()"]),
        (np.zeros((0, 3)), ["empty array of shape (0, 3)"]),
        (np.zeros((3, 0)), ["empty array of shape (3, 0)"]),
        (np.zeros(0), ["empty array"]),
        (np.array([[1j]]), ["complex"]),
        (np.array([["a"]]), ["text", "not numbers"]),
        (np.array(["2020-01-01"], dtype="M8[D]"), ["dates"]),
        (np.zeros(2, dtype=[("a", float), ("b", int)]), ["records with the fields 'a', 'b'"]),
        (
            np.array([[1.0, np.nan], [np.inf, 1.0], [0, 0]]),
            ["in 2 rows (rows 0, 1, counted from 0)", "columns '0', '1'"],
        ),
        (np.array([[1.0], [1e300]]), ["beyond ±1e+30", "row 1", "rescale"]),
        (np.array([[-3e38]], dtype=np.float32), ["beyond ±1e+30"]),
        (np.array([[np.finfo(np.longdouble).max]]), ["row"]),
        (np.array([[np.inf]], dtype=np.float16), ["in 1 row (row 0"]),
    ],
)
def test_an_array_that_is_no_table_ends_in_a_sentence(sentence, saved, array, words):
    path = saved(array)
    sentence(read_table, path, words=[str(path), *words])


def test_python_objects_are_never_unpickled(sentence, tmp_path):
    boom = np.array([[{}]], dtype=object)
    np.save(tmp_path / "o.npy", boom)
    np.savez(tmp_path / "o.npz", x=boom)
    for name in ("o.npy", "o.npz"):
        assert "can run code; convert" in sentence(read_table, tmp_path / name)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("t.npy", _npy()[:-5], ["cut off or damaged", "numpy.save"]),
        ("t.npy", _npy()[:30], ["cut off or damaged"]),
        ("t.npy", b"1,2\n3,4\n", ["no .npy file", "numpy.save"]),
        ("t.npy", _npz(), ["no .npy file"]),
        ("t.npy", b"", ["is empty"]),
        ("t.npz", _npy(), ["no .npz file", "numpy.savez"]),
        ("t.npz", _npz()[:-30], ["cut off or damaged"]),
        ("t.npz", b"PK\x03\x04", ["cut off or damaged"]),
        ("t.npz", _npz(a=np.eye(2), b=np.eye(3)), ["2 arrays, 'a', 'b'", "numpy.save"]),
        ("t.npz", _npz(x=np.array([np.nan])), ["NaN"]),
    ],
)
def test_a_broken_array_file_ends_in_a_sentence(sentence, file, name, content, words):
    path = file(content, name)
    sentence(read_table, path, words=[str(path), *words])


def test_the_only_array_of_an_npz_is_read(file):
    table = read_table(file(_npz(x=np.arange(6).reshape(2, 3)), "t.npz"), ["2", "0"])
    assert table.values.tolist() == [[2, 0], [5, 3]] and table.columns == ("2", "0")


def test_a_zip_of_other_files_is_no_table(sentence, tmp_path):
    for name, members in (("text.npz", ["readme.txt"]), ("empty.npz", [])):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member in members:
                archive.writestr(member, "hello")
        assert "no array" in sentence(read_table, tmp_path / name)


@pytest.mark.parametrize("load", [load_wine, load_breast_cancer])
def test_the_tables_of_scikit_learn_are_read_back(tmp_path, load):
    data = load()
    path = write_table(tmp_path / "data.csv", data.data, data.feature_names)
    table = read_table(path)
    assert np.array_equal(table.values, data.data)
    assert table.columns == tuple(data.feature_names)
    frame = load(as_frame=True).frame
    frame.to_csv(path, index=False)
    assert read_table(path).columns[-1] == "target"
    assert np.array_equal(read_table(path).values[:, :-1], data.data)


# Writing ------------------------------------------------------------------------------------

FINITE = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=4),
    elements=st.floats(-1e30, 1e30),
)


@given(FINITE, st.booleans(), st.sampled_from([".csv", ".npy"]))
@A_FEW
def test_what_is_written_is_read_back_to_the_last_digit(tmp_path, values, named, suffix):
    names = tuple(f"c {i}, “{i}”" for i in range(values.shape[1])) if named else None
    table = read_table(write_table(tmp_path / f"t{suffix}", values, names))
    assert np.array_equal(table.values, values)
    assert table.columns == (
        names if names and suffix == ".csv" else tuple(map(str, range(values.shape[1])))
    )


def test_float32_is_written_with_its_own_digits(tmp_path):
    values = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    path = write_table(tmp_path / "t.csv", torch.tensor(values))
    assert np.array_equal(read_table(path).values.astype(np.float32), values)
    assert write_table(path, np.float32([[0.1]])).read_text() == "0.1\n"


def test_names_that_are_numbers_do_not_become_a_row_of_data(sentence, tmp_path):
    table = read_table(write_table(tmp_path / "a.csv", [[0, 1], [2, 3]]))
    again = read_table(write_table(tmp_path / "b.csv", table.values, table.columns))
    assert np.array_equal(again.values, table.values)
    message = sentence(write_table, tmp_path / "c.csv", [[1, 2]], ["id", "2019"])
    assert "'2019'" in message and "'c2019'" in message


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1.5, 2.5], "1.5\n2.5\n"),
        ([[True, False]], "1,0\n"),
        ([[1, -2]], "1,-2\n"),
        (pd.DataFrame({"a": [1.5]}), "1.5\n"),
        (torch.tensor([[0.5]]).bfloat16(), "0.5\n"),
        ([[float("nan"), float("-inf")]], "nan,-inf\n"),
        (np.zeros((0, 2)), ""),
    ],
)
def test_values_of_every_kind_are_written(tmp_path, values, expected):
    assert write_table(tmp_path / "t.csv", values).read_text() == expected


@pytest.mark.parametrize(
    "name, values, columns, words",
    [
        ("t.txt", ROWS, None, ["'.txt'", "written as .csv, .npy"]),
        ("t", ROWS, None, ["no suffix"]),
        ("t.npz", ROWS, None, ["'.npz'"]),
        ("none/t.csv", ROWS, None, ["no folder", "create it first"]),
        ("folder.csv", ROWS, None, ["is a folder"]),
        ("t.csv", ROWS, ["a"], ["1 name for values with 2 columns"]),
        ("t.csv", ROWS, "ab", ["single value"]),
        ("t.csv", ROWS, 5, ["single value"]),
        ("t.csv", ROWS, ["a", "\ud800"], ["cannot be written"]),
        ("t.csv", ROWS, ["a", ""], ["''"]),
        ("t.csv", [["a"]], None, ["text"]),
        ("t.npy", np.array([[{}]]), None, ["Python objects"]),
        ("t.npy", np.zeros((2, 2, 2)), None, ["(2, 2, 2)"]),
        ("x" * 300 + ".csv", ROWS, None, ["no path to write to", "too long"]),
    ],
)
def test_what_cannot_be_written_is_a_sentence_and_leaves_nothing(
    sentence, tmp_path, name, values, columns, words
):
    (tmp_path / "folder.csv").mkdir()
    sentence(write_table, tmp_path / name, values, columns, words=words)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.csv"]


def test_a_failure_leaves_the_old_table_alone(sentence, tmp_path, monkeypatch):
    path = write_table(tmp_path / "t.npy", ROWS)

    def full(file_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in sentence(write_table, path, [[9.0]])
    assert read_table(path).values.tolist() == ROWS
    assert list(tmp_path.iterdir()) == [path]


def test_a_mapped_table_can_be_written_over_itself(tmp_path):
    path = write_table(tmp_path / "t.npy", ROWS)
    table = read_table(path)
    write_table(path, table.values[::-1])
    assert table.values.tolist() == ROWS and read_table(path).values.tolist() == ROWS[::-1]


def test_a_new_file_has_the_rights_of_any_new_file_and_a_link_stays_a_link(tmp_path):
    path, other = tmp_path / "t.csv", written(tmp_path / "other", "")
    (tmp_path / "link.csv").symlink_to(path)
    assert write_table(tmp_path / "link.csv", ROWS) == tmp_path / "link.csv"
    assert (tmp_path / "link.csv").is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


@pytest.mark.parametrize(
    "names",
    [["RI", "Na", "Mg"], ["none", "x", "null"], ["unnamed 0", "0", "1"], ["NA", "nan", "-"]],
)
def test_names_that_a_table_was_read_with_are_written_again(names, tmp_path):
    values = [[0.5, 1.5, 2.5], [3.0, 4.0, 5.0]]
    again = read_table(write_table(tmp_path / "t.csv", values, names))
    assert again.values.tolist() == values
    assert again.columns in (tuple(names), ("0", "1", "2"))

from sparsekern.lab.report.scales import bars, stack


def test_bars_are_in_proportion():
    html = bars([("sparse", 1.0, "1 <ms"), ("dense", 4.0, "4 ms")], 8.0)
    assert html.count('class="bar') == 2
    assert "width:12.50%" in html and "width:50.00%" in html and "1 &lt;ms" in html


def test_nothing_has_no_length():
    assert "width:0.00%" in bars([("sparse", 0.0, "0")], 0.0)


def test_a_stack_names_its_parts():
    html = stack({"values": 1.0, "index": 0.5}, 6.0)
    assert "values 1 MiB" in html and "index 0.5 MiB" in html
    assert "width:16.67%" in html and "width:8.33%" in html and "width:100.00%" in html
    assert "1.5 MiB" in html and "6 MiB" in html


def test_a_sparse_network_may_be_larger():
    assert "width:50.00%" in stack({"values": 3.0}, 1.5)

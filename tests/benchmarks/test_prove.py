"""What `make prove` keeps of the tests that it runs."""

from __future__ import annotations

from xml.etree import ElementTree

from benchmarks.harness.report import Report
from benchmarks.prove import judge_tests

RESULTS = """<testsuites><testsuite>
<testcase classname="a" name="one" time="1.5"/>
<testcase classname="a" name="two" time="0"><skipped/></testcase>
{}
</testsuite></testsuites>"""


def judged(more: str) -> Report:
    report = Report("tests")
    judge_tests(ElementTree.fromstring(RESULTS.format(more)), report)
    return report


def test_all_that_were_not_skipped_have_to_pass() -> None:
    report = judged("")
    assert report.all_hold
    assert report.figures["seconds"]["a::one"] == 1.5
    assert not judged('<testcase classname="b" name="bad" time="2"><failure/></testcase>').all_hold
    assert judged('<testcase classname="b" name="worse"><error/></testcase>').figures["failed"] == ["worse"]


def test_no_tests_prove_nothing() -> None:
    report = Report("tests")
    judge_tests(ElementTree.fromstring("<testsuites/>"), report)
    assert not report.all_hold

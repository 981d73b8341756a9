"""count.py RESULTS: adds up what a test run left behind and prints "N passed, N failed" last; exits 1 on any failure.

RESULTS holds `stages`, the names of those that were begun; for each of them STAGE.xml (ctest's JUnit file: one entry a
program) and STAGE/test_NAME.json (GoogleTest's own report); and `checks` with a line "NAME ok|failed" for each check
that is not a test program.
"""
import json
import pathlib
import sys
import xml.etree.ElementTree as xml

root = pathlib.Path(sys.argv[1])
passed = 0
failures = []
skipped = 0

for report in sorted(root.glob("*.xml")):
    stage = report.stem
    programs = list(xml.parse(report).getroot().iter("testcase"))
    if not programs:
        failures.append(f"{stage}: no tests ran")
    for program in programs:
        name = program.get("name")
        broken = program.get("status") != "run"
        detail = root / stage / f"test_{name}.json"
        before = len(failures)
        if detail.exists():
            for suite in json.loads(detail.read_text())["testsuites"]:
                for test in suite["testsuite"]:
                    if test.get("failures"):
                        failures.append(f"{stage}: {suite['name']}.{test['name']}")
                    elif test.get("result") == "SKIPPED":
                        skipped += 1
                    elif test.get("status") == "RUN":
                        passed += 1
        elif not broken:
            passed += 1
        if broken and len(failures) == before:
            failures.append(f"{stage}: {name} crashed, hung or could not start")

begun = root / "stages"
for stage in begun.read_text().split() if begun.exists() else []:
    if not (root / f"{stage}.xml").exists():
        failures.append(f"{stage}: did not end")

checks = root / "checks"
for line in checks.read_text().splitlines() if checks.exists() else []:
    name, outcome = line.split()
    if outcome == "ok":
        passed += 1
    else:
        failures.append(name)

if not passed and not failures:
    failures.append("nothing ran")
for failure in failures:
    print(f"FAILED {failure}")
if skipped:
    print(f"{skipped} skipped: each says above what it lacks")
print(f"{passed} passed, {len(failures)} failed")
sys.exit(1 if failures else 0)

from __future__ import annotations

import json
import subprocess
import sys

import tpv

SCRIPT = """
import sys, time
began = time.process_time()
import tpv
took = time.process_time() - began
after_import = sorted(sys.modules)
tpv.Client
import json
print(json.dumps({"seconds": took, "modules": after_import, "with_client": sorted(sys.modules)}))
"""


def test_the_import_is_light_and_fast() -> None:
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    heavy = {"torch", "transformers", "sqlalchemy", "fastapi", "tpv_service", "tpv_worker", "tpv.progress"}
    assert not heavy & set(runs[0]["with_client"])
    assert not {"httpx", "pydantic", "rich"} & set(runs[0]["modules"])
    assert min(run["seconds"] for run in runs) < 0.5


def test_what_is_exported_is_there() -> None:
    assert tpv.__all__ == sorted(tpv.__all__)
    for name in tpv.__all__:
        assert getattr(tpv, name) is not None

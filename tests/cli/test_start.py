"""The command starts without torch and knows every model where one is loaded."""

import json
import subprocess
import sys

import pytest

from ehrseq import EhrTokenizer, simulate
from ehrseq.prepare import prepare_dataset
from ehrseq.work.engine import get_engine

HEAVY = "{'torch', 'transformers', 'polars'} & set(sys.modules)"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["prepare", "--help"], ["benchmark", "--help"], ["--version"]])
def test_it_answers_without_what_it_does_not_use(arguments):
    done = python(
        f"import sys\nfrom ehrseq.cli.app import main\nsys.argv = ['ehrseq', *{arguments}]\n"
        f"try: main()\nfinally: print('loaded', {HEAVY}, file=sys.stderr)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "loaded set()"
    assert "ehrseq" in done.stdout


def test_the_tokenizer_of_the_command_brings_its_code(tmp_path):
    simulate(40, seed=0).write_fhir(tmp_path / "fhir")
    prepare_dataset(tmp_path / "fhir", tmp_path / "dataset", engine=get_engine(num_workers=1))
    command = [sys.executable, "-P", "-m", "ehrseq.cli.app", "tokenize", str(tmp_path / "dataset"), "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True)
    written = tmp_path / "dataset" / "encoded" / "tokenizer"
    EhrTokenizer.from_pretrained(written).save_pretrained(tmp_path / "here")
    names = {path.name for path in written.iterdir()} - {"fitted_on.json"}
    assert "tokenization_ehr.py" in names
    assert names == {path.name for path in (tmp_path / "here").iterdir()}
    assert "auto_map" in json.loads((written / "tokenizer_config.json").read_text())

"""The benchmarks' shared module: turns, medians, the machine, results that appear whole or not at all."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.harness import Costs, benchmark_parser, finish, in_turns, machine, write_json
from tests.in_process import run_module
from tests.processes import FROM_HERE


def test_ways_take_turns_and_short_ones_more_often():
    called = []
    ways = {"long": lambda: called.append("l"), "short": lambda: called.append("s")}
    costs = in_turns(ways, 2, calls={"short": 3}, warm_up=1)
    assert "".join(called) == "lsss" * 3
    assert [len(costs[name].cpu_all) for name in ways] == [2, 6]


def test_medians_are_of_all_calls():
    costs = Costs(wall_all=[1.0, 9.0, 2.0], cpu_all=[4.0, 0.0, 3.0])
    assert (costs.wall, costs.cpu) == (2.0, 3.0)


def test_cpu_seconds_are_of_work_not_of_waiting():
    import time

    costs = in_turns({"wait": lambda: time.sleep(0.05)}, 1)["wait"]
    assert costs.wall >= 0.05
    assert costs.cpu < costs.wall / 2


def test_the_machine_is_named():
    described = machine()
    assert {"cpu", "cores", "load_average_at_start", "torch", "transformers", "python"} <= described.keys()
    assert described["cpu"]
    assert described["cores"] >= 1
    json.dumps(described)


def test_a_result_is_written_with_its_machine_and_no_half_file_stays(tmp_path, capsys):
    file = tmp_path / "new" / "result.json"
    finish({"rate": 2.5}, file)
    written = json.loads(file.read_text())
    assert written["rate"] == 2.5
    assert "cpu" in written["machine"]
    assert json.loads(capsys.readouterr().out) == written
    with pytest.raises(TypeError):
        write_json({"rate": object()}, file)
    assert json.loads(file.read_text()) == written
    assert [each.name for each in file.parent.iterdir()] == ["result.json"]


def test_every_benchmark_has_the_two_options():
    options = benchmark_parser("text", repeats=7).parse_args([])
    assert (options.repeats, options.output) == (7, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the benchmark would run")
def test_the_benchmark_of_the_gpu_says_that_there_is_none():
    done = run_module("benchmarks.speed.bench_gpu")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "no GPU is here; benchmarks/tables/mamba_table.py has the table of the CPU.\n"


def test_the_benchmark_of_evaluation_runs():
    sizes = ("--rows", 400, "--patients", 200, "--resamples", 5, "--repeats", 1)
    result = json.loads(run_module("benchmarks.speed.bench_evaluation", *sizes).stdout)
    assert result["rows"] == 400
    assert result["cpu_seconds"].keys() == {"all intervals", "scikit-learn, once"}
    assert result["met"]


def test_the_benchmark_of_prefix_deltas_runs():
    result = json.loads(run_module("benchmarks.speed.bench_explanations", "--quick", "--repeats", 1).stdout)
    assert (result["events"], result["visits"], result["tokens"]) == (120, 6, 144)
    assert result["passes"].keys() == result["passes_wall"].keys() == {"visit", "event", "whole"}
    assert all(passes > 0 for passes in result["passes_wall"].values())


def test_the_benchmark_of_relevance_runs():
    result = json.loads(
        run_module("benchmarks.speed.bench_relevance", "--quick", "--only", "time", "--repeats", 1).stdout
    )
    families = [name for name in result if name != "machine"]
    assert families == ["ehrmamba", "hymate", "cehrbert", "ehr_bigbird"]
    assert all(result[family]["relevance"] > 0 for family in families)
    assert [family for family in families if "hidden_attention" in result[family]] == ["ehrmamba", "hymate"]


def test_the_benchmark_of_forecasts_runs():
    result = json.loads(run_module("benchmarks.speed.bench_forecast", "--quick", "--repeats", 1).stdout)
    rates = result["tokens_a_second"]
    assert {"generate", "sampled", "engine"} <= rates.keys()
    assert all(rate > 0 for rate in rates.values())
    assert result["some"]["patients"] == 2
    assert result["some"]["peak_mib"] > 100


@pytest.mark.slow
def test_one_command_prints_the_table_of_the_blocks(tmp_path):
    script = "benchmarks.tables.mamba_table"
    command = [sys.executable, "-P", "-m", script, "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, env=FROM_HERE, capture_output=True, text=True, check=True)
    figures = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(figures) >= 15
    assert "| packed rows, lognormal lengths | rows padded to 2048 | >= 4 |" in done.stdout
    # What is there is not measured again: a table of kept results takes no time.
    (tmp_path / "step.json").unlink()
    again = subprocess.run(command, env=FROM_HERE, capture_output=True, text=True, check=True)
    assert again.stderr.count("bench_") == 1


@pytest.mark.slow
def test_the_context_benchmark_measures_models_of_equal_size_and_meets_its_limit(tmp_path):
    script = "benchmarks.speed.bench_context"
    command = [sys.executable, "-P", "-m", script, "--quick", "--repeats", "1", "--threads", "1"]
    subprocess.run([*command, "--output", str(tmp_path / "c.json")], env=FROM_HERE, check=True, capture_output=True)
    found = json.loads((tmp_path / "c.json").read_text())
    systems = found["by_length"]["512"]
    assert list(systems) == ["ehrmamba", "bigbird", "dense"]
    weights = [system["weights"] for system in systems.values()]
    assert max(weights) / min(weights) < 1.01
    assert all(system["tokens_per_second"] > 0 and system["peak_mib"] > 0 for system in systems.values())
    ratio = systems["ehrmamba"]["tokens_per_second"] / systems["bigbird"]["tokens_per_second"]
    assert found["ratios"]["512"]["speed over bigbird"] == pytest.approx(ratio)
    # A row that does not fit is said to, not measured.
    small = [*command, "--limit_gib", "1.2", "--output", str(tmp_path / "s.json")]
    command = [word for word in small if word != "--quick"] + ["--lengths", "16384", "--layers", "2", "--steps", "1"]
    subprocess.run([*command, "--width", "64"], env=FROM_HERE, check=True, capture_output=True)
    assert json.loads((tmp_path / "s.json").read_text())["by_length"]["16384"]["bigbird"] is None

"""Every mistake in a configuration is one line with the origin, the key, the value and the fix."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jobs.config.reader import load_board, load_config, stored_config
from jobs.host.errors import UserError
from jobs.recipes import recipe_names


def complaint(*arguments: str, recipe: str = "movielens-100k") -> str:
    with pytest.raises(UserError) as error:
        load_config("train", recipe, list(arguments))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_loads(recipe):
    config = load_config("run", recipe, [])
    assert config.name == recipe
    assert str(config.shards_dir) == f"workspace/shards/{config.data.name}"


def test_files_and_overrides_follow_the_recipe_in_order(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 7\nmodel: {rank: 5}\noptimizer: {dense_lr: 0.5}\n")
    config = load_config("train", "movielens-100k", ["--config", str(file), "--model.rank", "6"])
    assert (config.seed, config.model["rank"], config.optimizer.dense_lr) == (7, 6, 0.5)


def test_a_mistake_is_told_before_the_large_libraries_are_loaded():
    """The parser resolves annotations of the sections' modules, and what those import for type checking alone."""
    code = """
import sys
from jobs.cli import run
assert run(["train", "movielens-100k", "--model.rnk", "3"]) == 2
print(*sorted({"ray", "mlflow", "deepspeed", "torchrec", "matplotlib"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stdout + done.stderr


def test_unknown_recipe_names_the_known_ones():
    known = ", ".join(recipe_names())
    assert complaint(recipe="movielens") == f"unknown recipe 'movielens': one of {known}, or the path of a YAML file"


def test_missing_recipe_file_is_named():
    assert complaint(recipe="nowhere.yaml").startswith("nowhere.yaml: no such file")


def test_unknown_key_on_the_command_line_names_the_nearest():
    assert complaint("--model.rnk", "3") == "command line: unknown key model.rnk: did you mean model.rank?"


def test_unknown_key_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {rnk: 5}\n")
    assert complaint("--config", str(file)) == f"{file}: unknown key model.rnk: did you mean model.rank?"


def test_broken_yaml_names_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: [")
    assert complaint("--config", str(file)).startswith(f"{file}: not valid YAML")


def test_numbers_are_decimal_in_files_and_on_the_command_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "training: {epochs: 010, max_seconds: 007}\ndata: {name: 007, prepare: {daily: {cut_off: 04:30}}}\n"
    )
    config = load_config("train", "ml-1m", ["--config", str(file), "--model.rank", "012"])
    assert (config.training.epochs, config.training.max_seconds, config.model["rank"]) == (10, 7, 12)
    assert (config.data.name, config.data.prepare.daily.cut_off) == ("007", "04:30")
    file.write_text("training: {epochs: 1:30}\n")
    assert complaint("--config", str(file)) == f"{file}: training.epochs=1:30: must be a whole number"
    assert complaint("--training.max_seconds", "1:30.5") == (
        "command line: training.max_seconds=1:30.5: must be a number"
    )


def test_a_doubled_key_names_the_file_the_key_and_its_lines(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("training: {epochs: 2}\nseed: 1\ntraining: {patience: 2}\n")
    told = f"{file}: not valid YAML: line 3: key 'training' is in line 1 already: keep one of them"
    assert complaint("--config", str(file)) == told
    assert complaint(recipe=str(file)) == told


def test_value_of_the_wrong_type_names_key_and_value():
    assert complaint("--seed", "x") == "command line: seed=x: must be a whole number"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.rank", "65"], "model.rank = 65 must not exceed width = 64"),
        (["--parallel.precision", "fp16"], "parallel.precision=fp16: loss scaling would leak"),
        (["--parallel.num_workers", "0"], "parallel.num_workers=0: must be 1 or more"),
        (["--parallel.num_workers", "[2, 1]"], "parallel.num_workers=[2, 1]: must be one number, or [MIN, MAX] with"),
        (["--parallel.num_workers", "[0, 1]"], "parallel.num_workers=[0, 1]: must be one number, or [MIN, MAX] with"),
        (["--parallel.num_workers", "[1, 2, 3]"], "parallel.num_workers=[1, 2, 3]: must be one number, or [MIN, MAX]"),
        (["--parallel.stall_seconds", "1"], "parallel.stall_seconds=1: must be 10 or more"),
        (["--cluster.max_failures", "-2"], "cluster.max_failures=-2: must be -1 (no limit), 0 or more"),
        (["--parallel.table_memory", "uvm"], "parallel.table_memory='uvm': must be device, host, cached"),
        (
            ["--parallel.table_memory", "host"],
            "parallel.table_memory=host: must be device if parallel.device is cpu",
        ),
        (["--parallel.precision", "bf16", "--parallel.zero_stage", "0"], "parallel.precision=bf16 with zero_stage=0"),
        (
            ["--data.requests.negatives", "popularity", "--data.requests.popularity_power", "2"],
            "data.requests.popularity_power is 2.0: it must be from 0 to 1",
        ),
        (["--training.epochs", "0"], "training.epochs=0: must be from 1 to 1,000,000"),
        (["--training.epochs", str(10**20)], f"training.epochs={10**20}: must be from 1 to 1,000,000"),
        (["--optimizer.dense_lr", "-1"], "optimizer.dense_lr=-1.0: must be a number above 0"),
    ],
)
def test_value_out_of_range_names_section_value_and_rule(arguments, expected):
    assert complaint(*arguments).startswith(f"command line: {expected}")


def test_history_negatives_without_log_q_are_refused():
    assert complaint("--data.requests.history_negatives", "8") == (
        "data.requests.history_negatives=8: set training.log_q=true, otherwise the model learns to avoid items of "
        "the history"
    )


def test_log_q_without_drawn_negatives_is_refused():
    assert complaint("--training.log_q", "true", "--data.requests.num_negatives", "0") == (
        "training.log_q=true: must be false, data.requests.num_negatives=0 draws no negatives to correct for"
    )
    said = complaint("--training.log_q", "true", recipe="movielens-100k-impressions")
    assert said == "training.log_q=true: must be false, task impressions draws no negatives to correct for"


def test_value_out_of_range_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("parallel: {num_workers: 0}\n")
    assert complaint("--config", str(file)) == f"{file}: parallel.num_workers=0: must be 1 or more"


def test_unknown_model_names_the_known_ones():
    assert (
        complaint("--model.name", "solr")
        == "model.name='solr': must be one of solar, din, linear_attention, light_sans, mean_pooling, "
        "recgrela, sasrec, hstu, gru4rec, linrec, light_sans_sequence"
    )


def test_a_recipe_serves_other_models_with_what_they_have_too():
    config = load_config("train", "movielens-100k", ["--model.name", "din", "--model.whole_history", "false"])
    assert (config.model["name"], config.model["user_features"], config.model["whole_history"]) == ("din", False, False)
    assert config.name == "movielens-100k-din"
    assert load_config("train", "movielens-100k", ["--model.name", "recgrela"]).model["form"] == "causal"
    # The recipe's form is one that only SOLAR has.
    assert load_config("train", "synthetic-moods", ["--model.name", "linear_attention"]).model["form"] == "linear"
    assert "model.rank" in complaint("--model.name", "din", "--model.rank", "8")


@pytest.mark.parametrize(("key", "value"), [("training.loss", "catalogue"), ("training.pointwise_loss_weight", "0")])
def test_a_number_that_all_logits_share_needs_a_loss_that_it_changes(key, value):
    sasrec = ["--model.name", "sasrec", "--model.initial_logit", "-5.5", "--compare", "[]"]
    said = complaint(*sasrec, "--data.requests.num_negatives", "0", f"--{key}", value)
    assert said == (
        f"model.initial_logit=-5.5: {key}={value} is the same for any number that all logits share: set "
        "--model.initial_logit null"
    )


def test_a_misspelt_key_of_a_recipe_is_found_with_any_model(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {name: solar, rnk: 8}\n")
    for model in ("solar", "din"):
        assert "unknown key model.rnk" in complaint("--model.name", model, recipe=str(recipe))


def test_secrets_in_uris_never_leave_the_config():
    config = load_config("train", "movielens-100k", ["--tracking.uri", "https://me:hunter2@mlflow.example/x"])
    assert config.tracking.uri == "https://me:hunter2@mlflow.example/x"
    assert config.as_dict()["tracking"]["uri"] == "https://me:***@mlflow.example/x"


def test_identity_follows_what_decides_the_weights_and_nothing_else():
    base = load_config("train", "movielens-100k", [])
    elsewhere = load_config("train", "movielens-100k", ["--parallel.num_workers", "4", "--tracking.experiment", "x"])
    other = load_config("train", "movielens-100k", ["--model.rank", "8"])
    assert elsewhere.fingerprint() == base.fingerprint()
    assert other.fingerprint() != base.fingerprint()


def test_workers_may_be_a_range_which_is_no_part_of_the_identity(tmp_path):
    file = tmp_path / "range.yaml"
    file.write_text("parallel: {num_workers: [1, 3], threads_per_worker: 2}\n")
    base, ranged = (load_config("train", "movielens-100k", each) for each in ([], ["--config", str(file)]))
    parallel = ranged.parallel
    assert (parallel.min_workers, parallel.max_workers, parallel.num_cpus) == (1, 3, 6)
    assert (base.parallel.workers_text, parallel.workers_text) == ("2 workers", "1 to 3 workers")
    assert (base.parallel.elastic, parallel.elastic) == (False, True)
    assert ranged.fingerprint() == base.fingerprint()
    given = load_config("train", "movielens-100k", ["--parallel.num_workers", "[2, 4]"])
    assert given.as_dict()["parallel"]["num_workers"] == [2, 4]
    assert stored_config("evaluate", given.as_dict(), "here", []).parallel == given.parallel


def test_a_range_of_workers_survives_three_failures_unless_told_otherwise():
    cluster = load_config("train", "movielens-100k", []).cluster
    assert (cluster.restarts(elastic=False), cluster.restarts(elastic=True)) == (0, 3)
    told = load_config("train", "movielens-100k", ["--cluster.max_failures", "0"]).cluster
    assert (told.restarts(elastic=False), told.restarts(elastic=True)) == (0, 0)


def test_comparison_runs_beside_with_the_same_width():
    config = load_config("run", "movielens-100k", ["--model.width", "32"])
    compared = config.with_model("mean_pooling")
    assert compared.name == "movielens-100k-mean_pooling"
    assert compared.model["width"] == 32
    assert compared.training == config.training


def test_a_board_may_have_the_models_of_another_on_its_own_data():
    here, there = load_board("ml-100k", [])[1], load_board("ml-1m", [])[1]
    assert list(here) == list(there)
    assert {run.data.name for run in here.values()} == {"ml-100k"}
    for row in here:
        assert (here[row].model, here[row].optimizer) == (there[row].model, there[row].optimizer)


def test_settings_of_one_row_need_not_suit_the_others():
    (run,) = load_board("ml-1m", ["--model.shift_windows", "true"], only=["HSTU"])[1].values()
    assert run.model["shift_windows"]
    with pytest.raises(UserError, match=r"--only 'hstu': must be one of RecGRELA, repeats, .*HSTU"):
        load_board("ml-1m", [], only=["hstu"])


def test_stored_configuration_without_min_label_read_every_event():
    stored = load_config("train", "ml-1m", []).as_dict()
    assert stored_config("evaluate", stored, "here", []).data.requests.least_label == 1
    del stored["data"]["requests"]["min_label"]
    assert stored_config("evaluate", stored, "here", []).data.requests.least_label == 0
    asked = stored_config("evaluate", stored, "here", ["--data.requests.min_label", "1"])
    assert asked.data.requests.least_label == 1
    assert "min_label" not in stored["data"]["requests"]


@pytest.mark.parametrize("quote", ["", '"'])
def test_dates_and_times_of_day_need_no_quotes(tmp_path, quote):
    recipe, more = tmp_path / "mine.yaml", tmp_path / "more.yaml"
    recipe.write_text(
        f"data:\n  prepare: {{daily: {{folder: dt=%Y-%m-%d, until: {quote}2026-11-21{quote}, "
        f"days: [{quote}2026-11-20{quote}]}}}}\n"
        f"  requests: {{split: temporal, valid_from: {quote}2026-11-01{quote}, "
        f"test_from: {quote}2026-11-11 03:00:00{quote}}}\n"
    )
    more.write_text(f"data: {{prepare: {{daily: {{cut_off: {quote}14:00{quote}}}}}}}\n")
    data = load_config("train", str(recipe), ["--config", str(more)]).data
    daily = data.prepare.daily
    assert (daily.until, daily.days, daily.cut_off) == ("2026-11-21", ("2026-11-20",), "14:00")
    assert data.requests.bounds == (1793491200000, 1794366000000)


def test_a_run_of_a_recipe_yaml_is_named_after_its_data(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {name: shop}\n")
    workspace = ["--workspace", str(tmp_path / "ws")]
    assert load_config("train", str(recipe), workspace).name == "shop"
    assert load_config("train", str(recipe), [*workspace, "--data.name", "books"]).name == "books"
    assert load_config("train", str(recipe), [*workspace, "--name", "mine"]).name == "mine"
    recipe.write_text("data: {name: shop}\nmodel: {name: solar}\n")
    assert load_config("train", str(recipe), [*workspace, "--model.name", "din"]).name == "shop-din"
    assert complaint("--name", "", recipe=str(recipe)) == "name='': must be letters, digits, '.', '_' and '-'"


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".hidden", "a b", "", "x\n"])
def test_a_data_set_s_name_stays_in_the_workspace(name):
    assert complaint("--data.name", name) == (
        f"command line: data.name={name!r}: must be letters, digits, '.', '_' and '-', it names directories; for data "
        "elsewhere set events and shards"
    )


def test_a_data_set_s_name_is_told_with_its_key_where_the_file_has_other_names(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: x\nmodel: {name: solar}\nsource: {name: files}\ndata: {name: ../../x}\n")
    assert complaint(recipe=str(recipe)).startswith(f"{recipe}: data.name='../../x': must be letters, digits, ")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "a:b"])
def test_a_registered_model_s_name_stays_in_the_workspace(name):
    told = f"command line: tracking.registered_model={name!r}: must not hold '/' or ':', nor be '.' or '..'"
    assert complaint("--tracking.registered_model", name) == told
    assert load_config("train", "ml-1m", ["--tracking.registered_model", "my shop"]).registered_model == "my shop"


@pytest.mark.parametrize("room", ["runs", "nightly"])
def test_runs_and_nights_of_a_recipe_yaml_that_began_under_its_name_go_on(tmp_path, room):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {name: shop}\n")
    (tmp_path / "ws" / room / "recipe").mkdir(parents=True)
    assert load_config("train", str(recipe), ["--workspace", str(tmp_path / "ws")]).name == "recipe"
    stored = load_config("train", str(recipe), ["--name", "recipe"]).as_dict()
    assert stored_config("evaluate", stored, "here", []).name == "recipe"

"""Every setting is explained, in the terminal and in docs/configuration.md, as the schema has it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from example import CONF
from integration.launch import environment, python
from searchrl.cli import main
from searchrl.compose import compose_config
from searchrl.config import ConfigError
from searchrl.config.reference import group_options, known_keys, sections, written
from searchrl.config_cli import renew

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "configuration.md"
SETTINGS = {setting.key: setting for section in sections() for setting in section.settings}
OPTIONS = group_options(CONF)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["config", *words])
    return capsys.readouterr().out


# --- what is read from the schema -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "kind", "default", "meaning"),
    [
        ("optimizer.lr", "float", "1e-06", "Peak learning rate."),
        ("optimizer.betas", "[float, float]", "[0.9,0.98]", "Decay of the two moments."),
        ("device", "cpu | cuda", "cuda", "`cpu` or `cuda`."),
        ("model.path", "str", "''", "Must be given: hub name, folder, `package:smollm2-135m` (PyPI) or "),
        ("model.lora.targets", "list of str", "[]", "Names of adapted modules, say [q_proj, v_proj]; "),
        ("importance.hi", "float | null", "null", "Upper bound; unset: 2, at the geometric level 1.01."),
        ("reward.kwargs", "mapping", "{}", "custom, custom_group: further arguments."),
        ("resume", "bool | str", "false", "`true`: continue from the newest whole checkpoint in the run "),
        ("run_dir", "str", "runs/${name}", "Where everything that a run makes is kept."),
    ],
)
def test_a_setting_is_as_in_the_schema(key: str, kind: str, default: str, meaning: str) -> None:
    setting = SETTINGS[key]
    assert (setting.type, setting.default) == (kind, default)
    assert setting.meaning.startswith(meaning)
    assert "\n" not in setting.meaning


def test_everything_is_explained() -> None:
    assert len(SETTINGS) > 150
    assert [key for key, setting in SETTINGS.items() if not setting.meaning] == []
    assert [section.key for section in sections() if not section.meaning] == []
    assert [(group, name) for group, names in OPTIONS.items() for name in names if not names[name]] == []
    assert SETTINGS["loss.kind"].options["clip"] == "PPO's clipped surrogate, token by token."
    assert OPTIONS["advantage"]["dr_grpo"].startswith("Dr. GRPO (arXiv")  # no sentence ends there
    assert OPTIONS["experiment"]["smoke"].startswith("Every real part in about a minute")


def test_every_default_can_be_typed_as_it_is_shown() -> None:
    texts = [key for key, setting in SETTINGS.items() if "\n" in setting.default]
    given = {key: setting.default for key, setting in SETTINGS.items() if key not in texts}
    cfg, _ = compose_config([f"{key}={value}" for key, value in given.items()])
    assert sorted(texts) == ["episode.prompt_template", "reward.judge.prompt_template"]
    for key, default in given.items():
        value: object = cfg
        for part in key.split("."):
            value = getattr(value, part)
        assert written(value) == default.replace("${name}", "run")


def test_keys_are_unique() -> None:
    assert len(set(known_keys())) == len(known_keys())
    assert {"optimizer", "optimizer.lr", "model.lora", "steps"} <= set(known_keys())


# --- in the terminal ------------------------------------------------------------------------------------


def test_the_overview_names_every_section_setting_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    overview = shown(capsys)
    names = [section.key for section in sections() if "." not in section.key]
    names += [key for key in SETTINGS if "." not in key]
    assert [name for name in names if f"  {name} " not in overview] == []
    assert "  +experiment=          nq_hotpotqa," in overview
    words = overview.replace(",", " ").split()
    assert [name for names in OPTIONS.values() for name in names if name not in words] == []
    assert max(map(len, overview.splitlines())) <= 110


@pytest.mark.parametrize("section", [section for section in sections() if section.key])
def test_a_section_shows_its_settings(section: object, capsys: pytest.CaptureFixture[str]) -> None:
    key, settings = section.key, section.settings  # type: ignore[attr-defined]
    text = shown(capsys, key)
    assert text.startswith(f"{key}: ")
    for setting in settings:
        assert f"\n  {setting.key}=" in text
        assert setting.meaning in " ".join(text.split())


def test_one_setting_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "optimizer.schedule") == (
        "  optimizer.schedule=constant  (constant | linear)\n"
        "      What the learning rate does after the warm-up.\n"
        "        linear                Falls to zero at the last step.\n"
    )
    assert "short and without explanation" in shown(capsys, "episode.prompt_template")  # the whole of it


def test_a_group_shows_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("experiment", "+experiment"):
        assert "  worldfacts            The longer CPU run" in shown(capsys, word)
    assert "logger=OPTION" in shown(capsys, "logger")


def test_what_a_run_would_use(capsys: pytest.CaptureFixture[str]) -> None:
    every = shown(capsys, "+experiment=smoke", "optimizer.lr=3e-5", "name=mine").splitlines()
    assert "* optimizer.lr=3e-05   (default: 1e-06)" in every
    assert "  optimizer.weight_decay=0.01" in every
    assert "* run_dir=runs/mine   (default: runs/${name})" in every
    assert (
        "* episode.prompt_template={question}   (default: Answer the question. First reason inside"
        in "".join(line.partition(" <think>")[0] for line in every)
    )
    assert {line[2:].partition("=")[0] for line in every[:-2]} == set(SETTINGS)
    assert every[-1] == f"* differs from the default: {sum(line[0] == '*' for line in every[:-2])} settings"
    assert shown(capsys, "+experiment=smoke", "sampling", "deepspeed.zero_stage").splitlines() == [
        "* sampling.temperature=0.7   (default: 1.0)",
        "  sampling.top_p=1.0",
        "  sampling.top_k=0",
        "  deepspeed.zero_stage=2",
        "",
        "* differs from the default: 1 settings",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.lrr"], "setting or group 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        (["retreival"], "group 'retreival'; did you mean 'retrieval'?"),
        (["experimnt"], "did you mean 'experiment'?"),
        (["retrieval=bm52"], "there is no retrieval=bm52; did you mean bm25?"),
        (["+experiment=smoke", "optimizr.lr"], "setting 'optimizr.lr'; did you mean 'optimizer.lr'?"),
    ],
)
def test_what_does_not_exist_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        main(["config", *words])
    assert message in str(refused.value)


def test_a_key_is_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "canary-0123456789-value")
    with pytest.raises(ConfigError) as refused:
        main(["config", "reward.judge.model=${oc.env:JUDGE_API_KEY}"])
    assert "canary" not in str(refused.value) + capsys.readouterr().out


def test_it_works_from_a_wheel_without_the_heavy_libraries(tmp_path: Path) -> None:
    """From a copy of what a wheel holds: sources and YAML files come from the package itself."""
    shutil.copytree(ROOT / "src" / "searchrl", tmp_path / "site" / "searchrl")
    program = (
        "import sys; from searchrl.cli import main\n"
        "main(['config', 'optimizer.lr']); main(['config', 'reward']); main(['completion', 'bash'])\n"
        "print('from:', sys.modules['searchrl'].__file__)\n"
        "print('loaded:', *({'torch', 'hydra', 'omegaconf', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "Peak learning rate." in done.stdout
    assert "  em_plus_format        Exact match, and 0.2 for a valid format." in done.stdout
    assert "+experiment=quickstart" in done.stdout
    assert done.stdout.endswith(f"from: {tmp_path}/site/searchrl/__init__.py\nloaded:\n")


# --- the document ---------------------------------------------------------------------------------------


def test_the_document_is_up_to_date() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert renew(text) == text, "run: searchrl config --markdown docs/configuration.md"


def test_the_document_has_every_key_and_whole_tables() -> None:
    lines = renew(DOCUMENT.read_text(encoding="utf-8")).splitlines()
    assert [key for key in SETTINGS if sum(line.startswith(f"| `{key}` |") for line in lines) != 1] == []
    widths = {line.replace(r"\|", "").count("|") for line in lines if line.startswith("| `")}
    assert widths == {3, 5}


def test_the_reference_is_renewed_below_the_introduction(tmp_path: Path) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    introduction, mark, _ = text.partition("<!-- From here on")
    (tmp_path / "stale.md").write_text(text.replace("Peak learning rate.", "?"), encoding="utf-8")
    main(["config", "--markdown", str(tmp_path / "stale.md")])
    assert (tmp_path / "stale.md").read_text(encoding="utf-8") == text
    with pytest.raises(ConfigError, match="below which the reference is written"):
        renew(introduction)
    assert mark


@pytest.mark.parametrize(
    "command",
    [
        line.strip().partition(" #")[0].split()[1:]
        for line in DOCUMENT.read_text(encoding="utf-8").splitlines()
        if line.startswith("    searchrl config")
    ],
)
def test_commands_of_the_document_work(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(command)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("arguments", [["config", "retrieval"], ["completion", "bash"]])
def test_a_reader_may_leave_early(arguments: list[str]) -> None:
    command = shlex.join(python("searchrl.cli", arguments))
    ended = subprocess.run(
        ["bash", "-c", f"{command} | head -1"], env=environment(), capture_output=True, text=True, check=True
    )
    assert ended.stdout.count("\n") == 1
    assert ended.stderr == ""

"""policy.toml is read strictly, and approvals are of the very text that was read."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command_line import invoke
from support.errors import raises

from fedlora.config import parse_config
from fedlora.errors import ConfigError, PolicyError
from fedlora.site.approvals import MOST_ASKED, Approvals, config_hash
from fedlora.site.policy import Policy, load_policy


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("max_rnk = 3", "unknown-key", "max_rank"),
        ("max_rank = 0", "bad-value", "max_rank"),
        ("max_rank = 'many'", "bad-value", "max_rank"),
        ("tasks = 'causal-lm'", "bad-value", "tasks"),
        ("private_only = true\nepsilon = 3", "epsilon-without-delta", "delta"),
        ("private_only = true\ndelta = 1e-5", "epsilon-without-delta", "epsilon"),
        ("epsilon = 3\ndelta = 1e-5", "cap-without-effect", "private_only"),
        ("private_only = true\nepsilon = inf\ndelta = 1e-5", "bad-value", "epsilon"),
        ("max_rank", "not-toml", "policy.toml"),
        (None, "no-such-file", "policy.toml"),
    ],
)
def test_a_policy_that_is_wrong_is_refused_in_one_line(text: str | None, code: str, named: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "policy.toml").write_text(text)
    with raises(ConfigError, code, named):
        load_policy(tmp_path)


def test_an_empty_policy_forbids_code_alone(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("")
    policy = load_policy(tmp_path)
    assert policy == Policy()
    assert policy.code == ()
    assert policy.budget is None


def test_the_page_for_the_site_has_every_clause() -> None:
    page = (Path(__file__).parents[3] / "docs" / "site.md").read_text(encoding="utf-8")
    assert [key for key in Policy.model_fields if f"`{key}`" not in page] == []


def test_a_policy_error_tells_the_clause_and_nothing_else() -> None:
    error = PolicyError("max_rank", "the policy allows 16", code="refused-by-policy")
    assert "max_rank" in str(error)
    assert "16" not in f"{error} {error.args}"


def test_the_hash_is_of_every_key() -> None:
    one = parse_config("")
    assert config_hash(one) == config_hash(parse_config("rounds = 10"))
    assert config_hash(one) != config_hash(parse_config("rounds = 11"))
    assert len(config_hash(one)) == 64


def test_what_was_changed_after_it_was_asked_is_not_approved(tmp_path: Path) -> None:
    approvals, config = Approvals(tmp_path), parse_config("rounds = 11")
    assert not approvals.allows(config)
    path = tmp_path / "asked" / f"{config_hash(config)}.toml"
    path.write_text(path.read_text().replace("rounds = 11", "rounds = 12"))
    with raises(ConfigError, "config-changed"):
        approvals.approve(config_hash(config))
    assert not approvals.allows(config)


def test_no_other_config_is_meant_by_a_beginning(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    for rounds in range(1, 40):  # more than there are first digits
        approvals.allows(parse_config(f"rounds = {rounds}"))
    waiting = approvals.waiting()
    twice = next(digest[0] for digest in waiting if sum(other[0] == digest[0] for other in waiting) > 1)
    for digest in ("", twice, "z"):
        with raises(ConfigError, "no-such-config"):
            approvals.approve(digest)
    assert approvals.approved() == []


def test_a_coordinator_does_not_fill_the_disk(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    for rounds in range(1, MOST_ASKED + 5):
        assert not approvals.allows(parse_config(f"rounds = {rounds}"))
    assert len(approvals.waiting()) == MOST_ASKED


def test_the_command_line_shows_and_approves(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("approval = true\nmax_rank = 16\n")
    config = parse_config("rounds = 11")
    Approvals(tmp_path).allows(config)
    digest = config_hash(config)
    shown = invoke("node", "show", tmp_path).stdout
    assert "approval = true\n" in shown
    assert f"waits {digest}\n" in shown
    assert "rounds = 11\n" in invoke("node", "show", tmp_path, digest[:6]).stdout
    assert invoke("node", "approve", tmp_path, digest[:6]).stdout == f"approved {digest}\n"
    assert f"approved {digest}\n" in invoke("node", "show", tmp_path).stdout
    again = invoke("node", "approve", tmp_path, digest)
    assert again.exit_code == 1
    assert again.stderr.startswith("error: no config here begins")

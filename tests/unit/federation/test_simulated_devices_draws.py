"""Devices: who is there, who is late, and what a round would have taken."""

from __future__ import annotations

import pytest
from support.errors import raises

from fedlora.config import parse_config
from fedlora.errors import ConfigError
from fedlora.federation.simulated_devices import SimulatedDevices

PROFILES = """
[train]
steps = 5
batch_size = 16
[server]
simulated_deadline_s = 30.0
[[clients.profiles]]
name = "server"
share = 1
rank = 16
[[clients.profiles]]
name = "phone"
share = 3
steps = 2
batch_size = 4
availability = 0.6
dropout = 0.25
examples_per_s = 2.0
download_mbit_s = 8.0
upload_mbit_s = 1.0
latency_s = 0.5
"""


def names(text: str, count: int) -> list[str]:
    config = parse_config(text)
    return [config.clients.profile_of(k).name for k in range(count)]  # type: ignore[union-attr]


def test_profiles_are_dealt_by_share_along_the_whole_row() -> None:
    dealt = names(PROFILES, 40)
    assert dealt.count("server") == 10
    for start in range(0, 40, 4):
        assert dealt[start : start + 4].count("server") == 1


def test_the_config_survives_toml() -> None:
    config = parse_config(PROFILES)
    assert parse_config(config.to_toml()) == config


def test_seconds_add_up_from_the_link_and_the_speed() -> None:
    devices = SimulatedDevices.of(parse_config(PROFILES))
    phone = next(k for k in range(4) if devices.profile(k).name == "phone")
    # 2 x 0.5 s latency, 1 MB at 8 Mbit/s, 8 examples at 2 a second, 0.5 MB at 1 Mbit/s
    assert devices.seconds(phone, bytes_down=1_000_000, examples=8, bytes_up=500_000) == pytest.approx(1 + 1 + 4 + 4)
    server = next(k for k in range(4) if devices.profile(k).name == "server")
    assert devices.seconds(server, bytes_down=10**9, examples=10**6, bytes_up=10**9) == 0.0


@pytest.mark.slow
def test_draws_have_the_given_rates_and_a_key_of_their_own() -> None:
    devices = SimulatedDevices.of(parse_config(PROFILES))
    phone = next(k for k in range(4) if devices.profile(k).name == "phone")
    there = [devices.available(number, phone) for number in range(4000)]
    drops = [devices.drops_out(number, phone) for number in range(4000)]
    assert sum(there) / 4000 == pytest.approx(0.6, abs=0.04)
    assert sum(drops) / 4000 == pytest.approx(0.25, abs=0.04)
    assert there == [devices.available(number, phone) for number in range(4000)]
    assert there != [
        SimulatedDevices.of(parse_config("seed = 1\n" + PROFILES)).available(number, phone) for number in range(4000)
    ]


def test_a_profile_changes_what_its_client_trains() -> None:
    config = parse_config(PROFILES)
    by_name = {config.clients.profile_of(k).name: config.train_of(k) for k in range(4)}  # type: ignore[union-attr]
    assert (by_name["server"].steps, by_name["server"].batch_size) == (5, 16)
    assert (by_name["phone"].steps, by_name["phone"].batch_size) == (2, 4)
    assert config.clients.rank_of(next(k for k in range(4) if names(PROFILES, 4)[k] == "server")) == 16


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        (
            '[[clients.profiles]]\nname = "a"\ndropout = 0.1',
            "dropout-without-deadline",
            "server.simulated_deadline_s",
        ),
        ("[server]\nsimulated_deadline_s = 5.0", "deadline-without-profiles", "clients.profiles"),
        ('[clients]\nranks = [4]\n[[clients.profiles]]\nname = "a"\nrank = 2', "ranks-given-twice", "clients.ranks"),
        ('[[clients.profiles]]\nname = "a"\nspeeed = 2', "unknown-key", "'clients.profiles.speeed'"),
        ('[[clients.profiles]]\nname = "a"\nsteps = 2\nepochs = 1', "steps-and-epochs", "clients.profiles"),
        ('[[clients.profiles]]\nname = "a"\navailability = 0', "bad-value", "availability"),
    ],
)
def test_a_wrong_combination_says_what_to_change(text: str, code: str, named: str) -> None:
    with raises(ConfigError, code, named):
        parse_config(text)

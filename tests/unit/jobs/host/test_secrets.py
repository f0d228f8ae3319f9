"""What others may write is not trusted."""

from __future__ import annotations

import pytest

from jobs.cluster.job_client import auth_headers
from jobs.host.errors import UserError
from jobs.host.secrets import refuse_open_directory


@pytest.mark.parametrize("mode", [0o777, 0o707, 0o702])
def test_directory_that_everybody_may_write_is_refused_with_the_fix(tmp_path, mode):
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(mode)
    with pytest.raises(UserError, match=f"^{state}: everybody may write there, .*: chmod o-w {state}$"):
        refuse_open_directory(state)


@pytest.mark.parametrize("mode", [0o1777, 0o775, 0o755, 0o700])
def test_directory_of_one_s_own_or_of_one_s_group_is_taken(tmp_path, mode):
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(mode)
    refuse_open_directory(state)
    refuse_open_directory(tmp_path / "not there yet")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
@pytest.mark.parametrize("place", ["home", "named"])
def test_token_that_others_may_write_is_refused_with_the_fix(tmp_path, mode, place):
    file = tmp_path / ".ray" / "auth_token" if place == "home" else tmp_path / "token"
    file.parent.mkdir(exist_ok=True)
    file.write_text("secret-token")
    file.chmod(mode)
    environment = {} if place == "home" else {"RAY_AUTH_TOKEN_PATH": str(file)}
    with pytest.raises(UserError, match=f"^{file}: others may write this token.*: chmod go-w {file}$") as raised:
        auth_headers(environment, tmp_path)
    assert "secret-token" not in str(raised.value)
    file.chmod(mode & 0o755)
    assert auth_headers(environment, tmp_path) == {"Authorization": "Bearer secret-token"}
    file.chmod(mode)
    assert auth_headers({"RAY_AUTH_TOKEN": "direct"}, tmp_path) == {"Authorization": "Bearer direct"}

"""Without tokens the service answers only its own machine's user."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000"])
async def test_loopback_names_are_answered(http, host):
    assert (await http.get("/healthz", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize("host", ["registry.example", "localhost.example:8000", "192.0.2.1", "", "[::1"])
async def test_another_name_is_refused(http, host):
    answer = await http.get("/healthz", headers={"Host": host})

    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/problem+json"


async def test_a_page_of_another_site_is_refused(http):
    assert (await http.post("/api/v1/jobs", headers={"Sec-Fetch-Site": "cross-site"})).status_code == 403


async def test_with_tokens_any_name_is_answered(settings):
    from tpv_service.app import create_app

    app = create_app(settings.model_copy(update={"authentication": True}))

    assert "LoopbackOnly" not in str(app.user_middleware)

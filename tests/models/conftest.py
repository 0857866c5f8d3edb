"""A tiny checkpoint of each family of decoders."""

import pytest
from made_families import CONFIGS, Family, make_family


@pytest.fixture(scope="module", params=CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(request.param, tmp_path_factory.mktemp(request.param))

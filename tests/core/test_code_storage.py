import pytest

from t3c.core.code_storage import CodeStorage, parse_code_storage


@pytest.mark.parametrize("codes", list(CodeStorage))
def test_every_way_of_storing_codes_is_found_by_name(codes: CodeStorage) -> None:
    assert parse_code_storage(str(codes)) is codes
    assert parse_code_storage(codes) is codes


def test_another_name_is_refused_with_those_that_there_are() -> None:
    message = "codes is 'shared'; allowed are 'nested', 'independent'"
    with pytest.raises(ValueError, match=message):
        parse_code_storage("shared")

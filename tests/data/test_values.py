from __future__ import annotations

import pytest

from searchrl.data.values import RELATIONS

READERS = {relation: read for relation, _, read in RELATIONS}


@pytest.mark.parametrize(
    ("relation", "text", "answers"),
    [
        ("capital", "Ashgabat (Ashkhabad)", ("Ashgabat",)),
        ("capital", "Port-au-Prince", ("Port-au-Prince",)),
        ("capital", "La Paz (administrative capital); Sucre (constitutional capital)", ()),
        ("capital", "no official capital", ()),
        ("currency", "cedis (GHC) per US dollar", ("cedis", "cedi", "GHC")),
        ("currency", "baht per US dollar", ("baht",)),
        ("currency", "1.5 (2023 est.)", ()),
        ("highest_point", "Mount Afadjato 885 m", ("Mount Afadjato",)),
        ("highest_point", "1 km SW of The Bluff on Cayman Brac 50 m", ()),
        ("highest_point", "unnamed location 5 m", ()),
        ("highest_elevation", "Mont Blanc 4,810 m", ("4,810 m", "4,810", "4,810 meters", "4,810 metres")),
        ("lowest_point", "Atlantic Ocean 0 m", ()),
        ("lowest_point", "Danakil Depression -125 m", ("Danakil Depression",)),
        ("coastline", "0 km", ()),
        ("coastline", "539 km", ("539 km", "539")),
        ("urban_population", "59.2% of total population (2023)", ("59.2%", "59.2 percent")),
        ("birth_rate", "27.09 births/1,000 population (2025 est.)", ("27.09",)),
        ("railways", "947 km (2022)", ("947 km", "947")),
        ("independence_year", "6 March 1957 (from the UK)", ("1957",)),
        ("independence_year", "3 March 1878 (autonomy); 22 September 1908 (complete)", ()),
        ("independence_day", "6 March 1957 (from the UK)", ("6 March 1957", "March 6, 1957")),
        ("national_day", "Independence Day, 6 March (1957)", ("6 March", "March 6")),
        ("national_day", "Independence Day, 3 October (1932); Republic Day, 14 July (1958)", ()),
        ("anthem", '"Kassaman" (We Pledge)', ("Kassaman", "We Pledge")),
        ("anthem", "none", ()),
        (
            "head_of_state",
            "President John Dramani MAHAMA (since 7 January 2025)",
            ("John Dramani Mahama", "Mahama"),
        ),
        ("head_of_state", "King HARALD V (since 17 January 1991)", ("Harald V", "Harald")),
        ("head_of_state", "vacant", ()),
        ("largest_ethnic_group", "Akan 45.7%, Mole-Dagbani 18.5%", ("Akan",)),
        ("largest_ethnic_group", "Bengali at least 99%", ()),
        ("export_commodity", "crude petroleum, gold (2023)", ("crude petroleum",)),
        ("domain", ".gh", (".gh",)),
        ("domain", ".gh; .example", ()),
        ("demonym", "Bosnian, Herzegovinian", ()),
    ],
)
def test_plain_fields_are_read_and_others_left_alone(
    relation: str, text: str, answers: tuple[str, ...]
) -> None:
    assert READERS[relation](text) == answers

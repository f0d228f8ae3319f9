"""What an import says of the tables beside the events."""

from __future__ import annotations

from jobs.config.run_config import SourceConfig
from jobs.data.prepare import import_events
from jobs.host.console import Console
from jobs.host.places import Place
from pipeline.sources.feature_tables import ItemColumns
from pipeline.sources.files import ImportConfig


def test_an_import_names_the_features_that_it_reads(tmp_path, capsys):
    (tmp_path / "clicks.csv").write_text("user_id,item_id,timestamp\n1,2,1700000000\n")
    (tmp_path / "items.csv").write_text("item_id,brand,price\n2,b,9\n")
    source = SourceConfig(
        name="files", path=Place(tmp_path / "clicks.csv"), items_path=Place(tmp_path / "items.csv"),
        files=ImportConfig(items=ItemColumns(features=("brand",))),
    )  # fmt: skip
    import_events(source, str(tmp_path / "log"), Console(), downloads=tmp_path)
    line = "features of items: brand; other columns of the table are not read\n"
    assert line in capsys.readouterr().out
